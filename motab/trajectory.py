"""The result of one generation: the training target, who wrote each token, and how each step was judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args

from motab_kernels.boundaries import SCORES

T = TypeVar("T")
Author = Literal["student", "flawed", "stitch", "teacher"]
Decode = Callable[[list[int]], str]  # token ids to text, such as a tokenizer's `decode`
Grade = Callable[["Trajectory", int], bool]  # whether a trajectory answers its problem; the place of its prompt
AUTHORS: tuple[Author, ...] = get_args(Author)
STATISTICS = (
    "forward_kl",
    "reverse_kl",
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
    "teacher_rank",
)


@dataclass
class Step:
    """One step of the student and the teacher's judgement of it.

    Attributes:
        start, end: the step is ``token_ids[start:end]`` of its trajectory. For a step not in the target
            (stitch=None), both are the position where the target continues, and `discarded_ids` holds its tokens.
        value: V, the geometric mean teacher probability of its tokens, or another score of the policy's boundary, see
            `Trajectory.score`.
        threshold: the boundary it was held to; 0 if the policy has none for V.
        accepted: whether the value is on the safe side of it (V: ``value >= threshold``).
    """

    start: int
    end: int
    value: float
    threshold: float
    accepted: bool
    discarded_ids: list[int] | None = None


@dataclass
class Trajectory:
    """A training target with its history.

    Attributes:
        index: the place of its prompt among the prompts.
        prompt_ids: the prompt's tokens.
        token_ids: the training target, an end token included where one was written.
        author: for each token ``"student"`` (kept), ``"flawed"`` (kept in the target though rolled back),
            ``"stitch"`` (the revise phrase) or ``"teacher"``.
        text: the target decoded, without special tokens.
        steps: the student's steps in order, flawed ones included; if single tokens are judged, only those that were not
            accepted.
        breach_step: t, the index of the first step that was not accepted; None without a breach.
        rollback_step: t*, the first step that was rolled back then (t + 1 if none was); None without a breach.
        finish_reason: ``"eos"`` or ``"length"``.
        statistics: for each name in `STATISTICS` one number per token, in nats, to six decimal places (rank: a count);
            None where it does not exist: a teacher's token has only `teacher_logprob` and `teacher_entropy`. Empty if
            nothing was scored, or if they were left out in reading.
        score: which score the values of steps are, as `motab_kernels.FixedBoundary` names it: ``"teacher_value"`` (V)
            or ``"value_ratio"``, safe when high, ``"forward_kl"`` or ``"teacher_rank"``, safe when low. None if nothing
            was judged or the file does not name it.
        by_token: whether single tokens were judged instead of steps.
        correct: whether the target answers its problem; None if it was not graded.
    """

    index: int
    prompt_ids: list[int]
    token_ids: list[int]
    author: list[Author]
    text: str
    steps: list[Step]
    breach_step: int | None
    rollback_step: int | None
    finish_reason: Literal["eos", "length"]
    statistics: dict[str, list[float | None]] = field(default_factory=dict)
    score: str | None = None
    by_token: bool = False
    correct: bool | None = None

    def __repr__(self) -> str:
        start = self.text if len(self.text) <= 60 else self.text[:60] + "..."
        return (
            f"Trajectory(index={self.index}, {len(self.token_ids)} tokens, breach_step={self.breach_step}, "
            f"rollback_step={self.rollback_step}, finish_reason={self.finish_reason!r}, text={start!r})"
        )

    @property
    def rolled_back(self) -> int | None:
        """Steps, or tokens if these are judged, that were rolled back at the first breach; None without a breach."""
        if self.breach_step is None or self.rollback_step is None:
            return None
        return self.breach_step + 1 - self.rollback_step

    def runs(self) -> list[tuple[Author, int, int]]:
        """(author, start, end) of each run ``token_ids[start:end]`` of tokens by one author, in order."""
        starts = [place for place, author in enumerate(self.author) if place == 0 or author != self.author[place - 1]]
        return [(self.author[start], start, end) for start, end in pairwise([*starts, len(self.author)])]

    def segments(self, decode: Decode) -> list[tuple[Author, str]]:
        """(author, text) of each run of tokens by one author, in order."""
        return [(author, decode(self.token_ids[start:end])) for author, start, end in self.runs()]

    def to_json(self) -> str:
        """One line of JSON; a number that is not finite is written as JSON's extension NaN or Infinity."""
        record = {**vars(self), "steps": [vars(step) for step in self.steps]}  # asdict would copy every number
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Trajectory:
        """The trajectory of one line that `to_json` wrote.

        Raises:
            ValueError: a line that `to_json` did not write; says what is wrong.
        """
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"invalid JSON ({error.msg.removesuffix(' at')} at character {error.pos})") from error
        found = _filled(cls, record)
        lists = {name: getattr(found, name) for name in ("prompt_ids", "token_ids", "author", "steps")}
        if wrong := [name for name, value in lists.items() if not isinstance(value, list)]:
            raise ValueError(f"{', '.join(wrong)} without a list")
        if not isinstance(found.index, int):
            raise ValueError(f"index {found.index!r}")
        if found.score is not None and found.score not in SCORES:
            raise ValueError(f"score {found.score!r}")
        found.steps = [_filled(Step, step) for step in found.steps]
        return found


def ignored_authors(authors: str | Sequence[str]) -> list[str]:
    """Validate `ignore_authors`, a name or a sequence of names, and return a list.

    Raises:
        ValueError: an unknown author, or all authors.
    """
    ignored = [authors] if isinstance(authors, str) else list(authors)
    if unknown := sorted(set(ignored) - set(AUTHORS)):
        raise ValueError(f"ignore_authors must be among {', '.join(AUTHORS)}, got {', '.join(unknown)}")
    if set(ignored) >= set(AUTHORS):
        raise ValueError("ignore_authors names every author: no token would be left to train on")
    return ignored


def _filled(kind: type[T], record: Any) -> T:
    """The instance of a dataclass from its JSON."""
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} in place of a {kind.__name__.lower()}")
    names = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    if unknown := [name for name in record if name not in names]:
        raise ValueError(f"a {kind.__name__.lower()} with unknown {', '.join(unknown)}")
    needed = [name for name, entry in names.items() if entry.default is MISSING and entry.default_factory is MISSING]
    if missing := [name for name in needed if name not in record]:
        raise ValueError(f"a {kind.__name__.lower()} without {', '.join(missing)}")
    return kind(**record)

"""What one generation wrote: the training target, who wrote each token, and how each step was judged."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Author = Literal["student", "flawed", "stitch", "teacher"]
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
        start, end: the step is ``token_ids[start:end]`` of its trajectory. Of a step that the target leaves
            out (stitch None) both tell where the target goes on, and `discarded_ids` holds its tokens.
        value: V, the geometric mean teacher probability of its tokens; or what else the policy's boundary looks at.
        threshold: the boundary it was held to.
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
        steps: the student's steps in order, flawed ones included; of a policy that judges single tokens, those alone
            that were not accepted.
        breach_step: t, the index of the first step that was not accepted; None without a breach.
        rollback_step: t*, the first step that was rolled back then (t + 1 where none was); None without a breach.
        finish_reason: ``"eos"`` or ``"length"``.
        statistics: for each name in `STATISTICS` a number a token in nats (rank: a count), None where it
            does not exist: a teacher's token has `teacher_logprob` and `teacher_entropy` alone.
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

    def to_json(self) -> str:
        """One line of JSON; a number that is not finite is written as JSON's extension NaN or Infinity."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Trajectory:
        """The trajectory of one line that `to_json` wrote."""
        record: dict[str, Any] = json.loads(line)
        record["steps"] = [Step(**step) for step in record["steps"]]
        return cls(**record)

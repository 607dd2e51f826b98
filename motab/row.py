"""The host's record of one trajectory in progress: its tokens, their judgement, and the training target.

A row's text is a sequence of *turns*: the student's are 0, 2, 4 ..., the teacher's 1, 3, 5 ...
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from motab.policies import Rules
from motab.sampling import stream_key
from motab.stitching import LAST_WORDS, opens_once, phrase_behind, readable, thinking_tags
from motab.trajectory import STATISTICS, Author, Step, Trajectory

Record = tuple[int, list[float | None]]  # a token and its statistics, in the order of STATISTICS
STUDENT, TEACHER = 0, 1
PADDING, BROKEN = -1, -2  # instead of a token: none was needed; its logits could not be drawn from


@dataclass
class Row:
    """One trajectory in progress.

    Attributes:
        rules: rules of the policy; None if the teacher writes alone.
        turn: number of the turn in progress.
        records: what the models see after the prompt; a rollback shortens it.
        turn_start, step_start: where in `records` the turn and the step in progress began.
        steps: of the target; those of the turn in progress, from `first_step_of_turn` on, still count places in
            `records`.
        teacher_steps_written: in this turn.
        target: the training target of the turns before this one.
    """

    index: int
    prompt_ids: list[int]
    seed: int
    rules: Rules | None
    max_new_tokens: int
    end_ids: Collection[int]
    turn: int = STUDENT
    records: list[Record] = field(default_factory=list)
    turn_start: int = 0
    step_start: int = 0
    steps: list[Step] = field(default_factory=list)
    first_step_of_turn: int = 0
    teacher_steps_written: int = 0
    target: list[tuple[Author, Record]] = field(default_factory=list)
    breach_step: int | None = None
    rollback_step: int | None = None
    ended: bool = False

    @property
    def author(self) -> int:
        """Who writes, STUDENT or TEACHER."""
        return self.turn % 2

    @property
    def key(self) -> int:
        """The random stream of this turn, see `motab.sampling.stream_key`."""
        return stream_key(self.seed, self.index, self.turn)

    @property
    def length(self) -> int:
        """Tokens of prompt and text."""
        return len(self.prompt_ids) + len(self.records)

    @property
    def text(self) -> list[int]:
        """The tokens that the models see."""
        return self.text_from(0)

    def text_from(self, place: int) -> list[int]:
        """The tokens that the models see from this place of prompt and text on."""
        begin = max(place - len(self.prompt_ids), 0)
        return self.prompt_ids[place:] + [token for token, _ in self.records[begin:]]

    @property
    def remaining(self) -> int:
        """Tokens of budget left."""
        return self.max_new_tokens - len(self.records)

    @property
    def pending(self) -> int:
        """The last token, which no cache holds yet."""
        return self.records[-1][0] if self.records else self.prompt_ids[-1]

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be written."""
        return self.ended or self.remaining == 0

    @property
    def watched(self) -> bool:
        """Whether the teacher takes over if the student strays."""
        limit = None if self.rules is None else self.rules.max_interventions
        return limit is None or self.turn // 2 < limit

    @property
    def turn_limits(self) -> tuple[int | None, int | None]:
        """The most steps and tokens of the teacher's turn in progress; None: no limit."""
        if self.rules is None or (self.rules.last_to_end and self.turn // 2 + 1 == self.rules.max_interventions):
            return None, None
        return self.rules.teacher_steps, self.rules.teacher_tokens

    @property
    def wanted(self) -> int:
        """The most tokens that this turn may still hold."""
        limit = self.turn_limits[1] if self.author == TEACHER else None
        return self.remaining if limit is None else min(self.remaining, self.turn_start + limit - len(self.records))

    def write(self, token: int, statistics: list[float | None]) -> None:
        """Enter one token.

        Raises:
            ValueError: it is BROKEN.
        """
        if token == BROKEN:
            who = "teacher" if self.author == TEACHER else "student"
            raise ValueError(
                f"expected logits to draw from, got NaN, infinity or only -inf from the {who} at token "
                f"{len(self.records)} of trajectory {self.index}: look for NaN in its weights, or load it in another "
                "dtype (bfloat16 or float32 instead of float16)"
            )
        self.records.append((token, statistics))
        self.ended = token in self.end_ids

    def judge(self, block: list[list[float]]) -> bool:
        """Enter one block by the student, up to where it strays; return whether the teacher takes over.

        Each token of the block is a row: id (PADDING ends the block), whether it ends a step, whether the student
        strays with it, score, threshold, statistics.
        """
        assert self.rules is not None
        for token, ends_step, strays, score, threshold, *statistics in block:
            if token == PADDING:
                return False
            self.write(int(token), list(statistics))
            if ends_step:
                # If every token is a step, accepted ones add nothing to their statistics.
                if strays or self.rules.delimiter is not None:
                    step = Step(self.step_start, len(self.records), score, threshold, accepted=not strays)
                    self.steps.append(step)
                self.step_start = len(self.records)
            if strays and self.watched:
                return True
        return False

    def enter(self, block: list[list[float]]) -> bool:
        """Enter one block by the teacher, up to the end of its turn; return whether it continues.

        Each token of the block is a row: id (PADDING ends the block), whether it completes a step, log-probability and
        entropy.
        """
        for token, completes_step, teacher_logprob, teacher_entropy in block:
            if token == PADDING:
                break
            known = {"teacher_logprob": teacher_logprob, "teacher_entropy": teacher_entropy}
            self.write(int(token), [known.get(name) for name in STATISTICS])
            if not self.continue_turn(bool(completes_step)):
                return False
        return True

    def take_over(self, rollback_position: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Roll back after the student strayed, and let the teacher write. `rollback_position` counts from the turn's
        start."""
        assert self.rules is not None
        stitch = self.rules.stitch
        keep = self._rollback_place(rollback_position)
        rolled_back = self.records[keep:]
        left_out = self._left_out_of_flawed(tokenizer)
        stays = [stitch is not None and token not in left_out for token, _ in rolled_back]
        if stitch is None:
            for step in self.steps[self.first_step_of_turn :]:
                if step.start >= keep:
                    step.discarded_ids = [token for token, _ in self.records[step.start : step.end]]
        self._renumber_turn([True] * (keep - self.turn_start) + stays)
        del self.records[keep:]
        self._close_turn("student")
        self.target += [("flawed", record) for record, it_stays in zip(rolled_back, stays, strict=True) if it_stays]
        if stitch is not None:
            last = [token for _, (token, _) in self.target[-LAST_WORDS:]]
            phrase = phrase_behind(tokenizer, last, stitch)
            self.target += [("stitch", (token, [None] * len(STATISTICS))) for token in phrase]
        self.ended = False

    def _rollback_place(self, rollback_position: int) -> int:
        """How many of `records` the teacher sees; enters breach and rollback step at the first breach."""
        assert self.rules is not None
        if self.rules.reflection:
            return len(self.records) - 1  # before the token at which the teacher would reflect
        breaching = self.steps[-1]
        end = breaching.end - self.ended  # nothing follows an end token
        places = {"td": self.turn_start + rollback_position, "breach": breaching.start, "none": end}
        keep = places[self.rules.backtrack]
        if self.breach_step is None:
            self.breach_step = len(self.steps) - 1
            starts = [step.start for step in self.steps]
            self.rollback_step = starts.index(keep) if keep in starts else len(starts)
        return keep

    def _left_out_of_flawed(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Tokens to drop from flawed text: an end token inside the target would teach to stop there, and a </think> to
        continue thinking after it."""
        return {*self.end_ids, *thinking_tags(tokenizer).values()}

    def _renumber_turn(self, stays: Sequence[bool]) -> None:
        """Let the steps of this turn count places in the target, given which of its records go there."""
        _renumber(self.steps[self.first_step_of_turn :], stays, self.turn_start, len(self.target))

    def continue_turn(self, completes_step: bool) -> bool:
        """Whether the teacher continues after the token just written; if not, the student's turn begins."""
        self.teacher_steps_written += completes_step
        steps, tokens = self.turn_limits
        is_over = self.teacher_steps_written == steps or len(self.records) - self.turn_start == tokens
        if is_over and not self.finished:
            self._close_turn("teacher")
        return not is_over

    def _close_turn(self, author: Author) -> None:
        self.target += [(author, record) for record in self.records[self.turn_start :]]
        self.turn += 1
        self.turn_start = self.step_start = len(self.records)
        self.first_step_of_turn, self.teacher_steps_written = len(self.steps), 0

    def trajectory(self, tokenizer: PreTrainedTokenizerBase) -> Trajectory:
        """The finished trajectory."""
        self._renumber_turn([True] * (len(self.records) - self.turn_start))
        self._close_turn("student" if self.author == STUDENT else "teacher")
        if any(author == "flawed" for author, _ in self.target):
            self._open_once(tokenizer)
        records = [record for _, record in self.target]
        token_ids = [token for token, _ in records]
        return Trajectory(
            index=self.index,
            prompt_ids=self.prompt_ids,
            token_ids=token_ids,
            author=[author for author, _ in self.target],
            text=readable(tokenizer, token_ids),
            steps=self.steps,
            breach_step=self.breach_step,
            rollback_step=self.rollback_step,
            finish_reason="eos" if self.ended else "length",
            statistics=_columns(records),
            score=None if self.rules is None else self.rules.boundary.rule.score,
            by_token=self.rules is not None and self.rules.delimiter is None,
        )

    def _open_once(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """If the flawed text opened the thinking, drop later `<think>` until it is closed."""
        stays = opens_once(tokenizer, [(token, author == "flawed") for author, (token, _) in self.target])
        _renumber(self.steps, stays)
        self.target = [entry for entry, it_stays in zip(self.target, stays, strict=True) if it_stays]


def _columns(records: Sequence[Record]) -> dict[str, list[float | None]]:
    """The statistics by name; empty if there is none."""
    columns = {name: [record[1][i] for record in records] for i, name in enumerate(STATISTICS)}
    return columns if any(value is not None for column in columns.values() for value in column) else {}


def _renumber(steps: Sequence[Step], stays: Sequence[bool], old_start: int = 0, new_start: int = 0) -> None:
    """Let steps count their places after entries were dropped.

    `stays` says which of the entries from place ``old_start`` on stay; the first of these gets place ``new_start``.
    """
    new_index = [*accumulate(stays, initial=new_start)]
    for step in steps:
        step.start, step.end = new_index[step.start - old_start], new_index[step.end - old_start]

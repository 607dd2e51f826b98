"""The host's record of one trajectory in progress: its tokens, their judgement, and the training target.

A row's text is a sequence of *turns*: the student's are 0, 2, 4 ..., the teacher's 1, 3, 5 ...
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from motab.drawing import stream_key
from motab.policies import SCORES_ALONE, Rules
from motab.stitching import LAST_WORDS, opens_once, phrase_behind, readable, thinking_tags
from motab.trajectory import STATISTICS, Author, Step, Trajectory

STUDENT, TEACHER = 0, 1
PADDING, BROKEN = -1, -2  # instead of a token: none was needed; its logits could not be drawn from


class Entry(NamedTuple):
    """A token of the target."""

    author: Author
    token: int
    statistics: list[float | None]  # in the order of STATISTICS


@dataclass
class Row:
    """One trajectory in progress.

    Attributes:
        rules: rules of the policy; None if the teacher writes everything.
        turn: number of the turn in progress.
        seen: what the models see after the prompt; a rollback shortens it.
        target: the training target so far; a rollback drops its end, or makes it flawed and adds the phrase.
        turn_start, step_start: where in `target` the turn and the step in progress began.
        steps: of the target.
        teacher_steps_written: in this turn.
        cache_row: its row of the caches, and of the device's state, while it is in progress; see `Admission.admit`.
    """

    index: int
    prompt_ids: list[int]
    seed: int
    rules: Rules | None
    max_new_tokens: int
    end_ids: Collection[int]
    turn: int = STUDENT
    seen: list[int] = field(default_factory=list)
    target: list[Entry] = field(default_factory=list)
    turn_start: int = 0
    step_start: int = 0
    steps: list[Step] = field(default_factory=list)
    teacher_steps_written: int = 0
    breach_step: int | None = None
    rollback_step: int | None = None
    ended: bool = False
    cache_row: int = field(init=False, repr=False, compare=False)

    @property
    def author(self) -> int:
        """Who writes, STUDENT or TEACHER."""
        return self.turn % 2

    @property
    def key(self) -> int:
        """The random stream of this turn, see `motab.drawing.stream_key`."""
        return stream_key(self.seed, self.index, self.turn)

    @property
    def next_key(self) -> int:
        """That of the next turn."""
        return stream_key(self.seed, self.index, self.turn + 1)

    @property
    def length(self) -> int:
        """Tokens of prompt and text."""
        return len(self.prompt_ids) + len(self.seen)

    @property
    def safe_length(self) -> int:
        """Tokens of prompt and text before the step in progress."""
        return self.length - (len(self.target) - self.step_start)

    @property
    def text(self) -> list[int]:
        """The tokens that the models see."""
        return self.text_from(0)

    def text_from(self, place: int) -> list[int]:
        """The tokens that the models see from this place of prompt and text on."""
        return self.prompt_ids[place:] + self.seen[max(place - len(self.prompt_ids), 0) :]

    @property
    def remaining(self) -> int:
        """Tokens of budget left."""
        return self.max_new_tokens - len(self.seen)

    @property
    def pending(self) -> int:
        """The last token, which no cache holds yet."""
        return self.seen[-1] if self.seen else self.prompt_ids[-1]

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
    def turn_remaining(self) -> int:
        """Tokens that this turn may still hold."""
        limit = self.turn_limits[1] if self.author == TEACHER else None
        return self.remaining if limit is None else min(self.remaining, self.turn_start + limit - len(self.target))

    def write(self, token: int, statistics: list[float | None]) -> None:
        """Enter one token.

        Raises:
            ValueError: it is BROKEN.
        """
        if token == BROKEN:
            raise self._no_numbers("teacher" if self.author == TEACHER else "student")
        self.seen.append(token)
        self.target.append(Entry("teacher" if self.author == TEACHER else "student", token, statistics))
        self.ended = token in self.end_ids

    def _no_numbers(self, who: str) -> ValueError:
        """The error of logits that are NaN or infinite."""
        return ValueError(
            f"expected logits to draw from, got NaN, infinity or only -inf from the {who} at token "
            f"{len(self.seen)} of trajectory {self.index}: look for NaN in its weights, or load it in another "
            "dtype (bfloat16 or float32 instead of float16)"
        )

    def judge(self, block: list[list[float]]) -> bool:
        """Enter one block by the student, up to where it strays; return whether the teacher takes over.

        Each token of the block is a row: id (PADDING ends the block), whether it ends a step, whether the student
        strays with it, score, threshold, statistics.

        Raises:
            ValueError: a token is BROKEN, or its score is NaN where nobody takes over for it.
        """
        assert self.rules is not None
        for token, ends_step, strays, score, threshold, *statistics in block:
            if token == PADDING:
                return False
            if token != BROKEN and math.isnan(score) and self.rules.boundary is SCORES_ALONE:
                raise self._no_numbers("teacher")
            self.write(int(token), list(statistics))
            if ends_step:
                # If every token is a step, accepted ones add nothing to their statistics.
                if strays or self.rules.delimiter is not None:
                    self.steps.append(Step(self.step_start, len(self.target), score, threshold, accepted=not strays))
                self.step_start = len(self.target)
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
        begin = self._rollback_place(rollback_position)
        rolled_back = self.target[begin:]
        del self.seen[len(self.seen) - len(rolled_back) :]
        if self.rules.stitch is None:
            for step in self._steps_behind(begin):
                if step.start >= begin:
                    step.discarded_ids = [entry.token for entry in self.target[step.start : step.end]]
            self._keep(begin, [False] * len(rolled_back))
        else:
            # An end token inside the target would teach to stop there, and a </think> to continue thinking after it.
            left_out = {*self.end_ids, *thinking_tags(tokenizer).values()}
            self._keep(begin, [entry.token not in left_out for entry in rolled_back])
            self.target[begin:] = [entry._replace(author="flawed") for entry in self.target[begin:]]
            last = [entry.token for entry in self.target[-LAST_WORDS:]]
            phrase = phrase_behind(tokenizer, last, self.rules.stitch)
            self.target += [Entry("stitch", token, [None] * len(STATISTICS)) for token in phrase]
        self._begin_turn()
        self.ended = False

    def _rollback_place(self, rollback_position: int) -> int:
        """From where on the target is rolled back; enters breach and rollback step at the first breach."""
        assert self.rules is not None
        if self.rules.reflection:
            return len(self.target) - 1  # before the token at which the teacher would reflect
        breaching = self.steps[-1]
        end = breaching.end - self.ended  # nothing follows an end token
        places = {"td": self.turn_start + rollback_position, "breach": breaching.start, "none": end}
        begin = places[self.rules.backtrack]
        if self.breach_step is None:
            self.breach_step = len(self.steps) - 1
            starts = [step.start for step in self.steps]
            self.rollback_step = starts.index(begin) if begin in starts else len(starts)
        return begin

    def _steps_behind(self, place: int) -> Iterator[Step]:
        """The steps that end behind this place of the target, the last one first."""
        return takewhile(lambda step: step.end > place, reversed(self.steps))

    def _keep(self, begin: int, stays: Sequence[bool]) -> None:
        """Drop entries of the target from place `begin` on, given which stay, and let steps count their places
        anew."""
        places = [*accumulate(stays, initial=begin)]
        for step in self._steps_behind(begin):
            step.start, step.end = (n if n < begin else places[n - begin] for n in (step.start, step.end))
        self.target[begin:] = [entry for entry, it_stays in zip(self.target[begin:], stays, strict=True) if it_stays]

    def continue_turn(self, completes_step: bool) -> bool:
        """Whether the teacher continues after the token just written; if not, the student's turn begins."""
        self.teacher_steps_written += completes_step
        steps, tokens = self.turn_limits
        is_over = self.teacher_steps_written == steps or len(self.target) - self.turn_start == tokens
        if is_over and not self.finished:
            self._begin_turn()
        return not is_over

    def _begin_turn(self) -> None:
        self.turn += 1
        self.turn_start = self.step_start = len(self.target)
        self.teacher_steps_written = 0

    def trajectory(self, tokenizer: PreTrainedTokenizerBase) -> Trajectory:
        """The finished trajectory."""
        # If the flawed text opened the thinking, it is not opened again until it is closed.
        self._keep(0, opens_once(tokenizer, [(entry.token, entry.author == "flawed") for entry in self.target]))
        token_ids = [entry.token for entry in self.target]
        return Trajectory(
            index=self.index,
            prompt_ids=self.prompt_ids,
            token_ids=token_ids,
            author=[entry.author for entry in self.target],
            text=readable(tokenizer, token_ids),
            steps=self.steps,
            breach_step=self.breach_step,
            rollback_step=self.rollback_step,
            finish_reason="eos" if self.ended else "length",
            statistics=_columns(self.target),
            score=None if self.rules is None else self.rules.boundary.criterion.score,
            by_token=self.rules is not None and self.rules.delimiter is None,
        )


def _columns(target: Sequence[Entry]) -> dict[str, list[float | None]]:
    """The statistics by name; empty if there is none."""
    columns = {name: [entry.statistics[i] for entry in target] for i, name in enumerate(STATISTICS)}
    return columns if any(value is not None for column in columns.values() for value in column) else {}

"""The host's books of one trajectory in progress: what was written, how it was judged, and the target made of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from motab.policies import MotabPolicy, Policy
from motab.trajectory import STATISTICS, Author, Step, Trajectory

Record = tuple[int, list[float | None]]  # a token and its statistics, in the order of STATISTICS
STUDENT, TEACHER = 0, 1


@dataclass
class Row:
    """One trajectory in progress.

    Attributes:
        records: what the models see after the prompt; a rollback shortens it.
        author: who writes next, STUDENT or TEACHER.
        keys: the random streams of the two, see `motab.sampling.stream_key`.
        kept: how many of the records the student wrote, once the teacher has taken over.
        flawed: the student's records that were rolled back.
    """

    index: int
    prompt_ids: list[int]
    keys: tuple[int, int]
    author: int
    max_new_tokens: int
    end_ids: Collection[int]
    records: list[Record] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    flawed: list[Record] = field(default_factory=list)
    kept: int = 0
    breach_step: int | None = None
    rollback_step: int | None = None
    ended: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and text."""
        return len(self.prompt_ids) + len(self.records)

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

    def write(self, token: int, statistics: list[float | None]) -> None:
        """Enter one token."""
        self.records.append((token, statistics))
        self.ended = token in self.end_ids

    def judge(self, block: list[list[float]], breached: bool, breach_position: int) -> bool:
        """Enter one block of the student's, up to a breach; returns whether it breached.

        A token of the block is its id (-1 ends the block), whether it ends a step, score, threshold, statistics.
        """
        for token, ends_step, score, threshold, *statistics in block:
            if token < 0:
                return False
            self.write(int(token), list(statistics))
            if ends_step:
                strays = breached and len(self.records) == breach_position
                start = self.steps[-1].end if self.steps else 0
                self.steps.append(Step(start, len(self.records), score, threshold, accepted=not strays))
                if strays:
                    return True
        return False

    def take_over(self, policy: MotabPolicy, rollback_position: int) -> None:
        """After a breach: roll back and let the teacher write."""
        breaching = self.steps[-1]
        end = breaching.end - self.ended  # nobody writes on behind an end token
        keep = {"td": rollback_position, "breach": breaching.start, "none": end}[policy.backtrack]
        self.breach_step = len(self.steps) - 1
        self.rollback_step = next((i for i, step in enumerate(self.steps) if step.start == keep), len(self.steps))
        self.records, self.flawed, self.kept = self.records[:keep], self.records[keep:], keep
        self.author, self.ended = TEACHER, False

    def trajectory(self, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> Trajectory:
        """The finished trajectory, its parts put together as the policy says."""
        parts: list[tuple[Author, list[Record]]]
        if self.breach_step is None:
            parts = [("student" if self.author == STUDENT else "teacher", self.records)]
        else:
            parts = [("student", self.records[: self.kept])]
            assert isinstance(policy, MotabPolicy)
            if policy.stitch is None:
                self._discard_flawed()
            else:
                # An end token amid the target would teach to stop there.
                flawed = [record for record in self.flawed if record[0] not in self.end_ids]
                parts += [("flawed", flawed), ("stitch", self._phrase(tokenizer, policy.stitch, flawed))]
                self.steps[-1].end = self.kept + len(flawed) if self.flawed else self.kept
            parts.append(("teacher", self.records[self.kept :]))
        records = [record for _, part in parts for record in part]
        token_ids = [token for token, _ in records]
        return Trajectory(
            index=self.index,
            prompt_ids=self.prompt_ids,
            token_ids=token_ids,
            author=[author for author, part in parts for _ in part],
            text=tokenizer.decode(token_ids, skip_special_tokens=True),
            steps=self.steps,
            breach_step=self.breach_step,
            rollback_step=self.rollback_step,
            finish_reason="eos" if self.ended else "length",
            statistics={name: [record[1][i] for record in records] for i, name in enumerate(STATISTICS)},
        )

    def _phrase(self, tokenizer: PreTrainedTokenizerBase, stitch: str, flawed: list[Record]) -> list[Record]:
        before = tokenizer.decode([token for token, _ in self.records[: self.kept] + flawed])
        breaks = len(before) - len(before.rstrip("\n"))
        blank = "\n" * max(2 - breaks, 0) if before else ""
        ids = tokenizer.encode(f"{blank}{stitch}\n\n", add_special_tokens=False)
        return [(token, [None] * len(STATISTICS)) for token in ids]

    def _discard_flawed(self) -> None:
        """Mark the steps that the target leaves out."""
        for step in self.steps:
            if step.start >= self.kept:
                step.discarded_ids = [token for token, _ in self.flawed[step.start - self.kept : step.end - self.kept]]
                step.start = step.end = self.kept

"""Speculative decoding of the teacher's text: the student drafts it too, and the teacher checks a block in one pass.

Both choose the token of a position with that position's random number. The teacher's choices are kept up to the first
that was not drafted, so the text is the one that the teacher writes alone, token for token, in fewer of its passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedModel

from motab.pass_time import PassTime
from motab_kernels.ragged_kv_cache_checks import keeps_states

#: Estimated seconds of a forward pass over so many rows, with so many new tokens each, after so many cached ones.
Seconds = Callable[[int, int, float], float]


class Plan(NamedTuple):
    """How the next round is written: the length of the student's draft, and whether it drafts the teacher's text."""

    length: int
    speculates: bool


class Speculation:
    """Plans rounds that yield the most tokens per second, from how often the teacher agreed so far.

    With a the share of drafted tokens that it confirms, s and t the seconds of a pass of the student and the teacher
    over some rows and tokens of each, a draft of T tokens for n rows that the student writes and m that the teacher
    writes yields

        (n T + m (1 - a^T) / (1 - a)) / (T s(n + m, 1) + t(n + m, T))

    tokens per second. If the teacher writes its rows alone, it is (n + m) T / (T s(n, 1) + t(n, T) + T t(m, 1)) with T
    the block size, without the passes for the student's rows if n = 0.

    Args:
        block_size: the longest draft.
        student, teacher: of their passes, see `motab.pass_time.PassTime`; None without the model: never speculate.

    Source: Leviathan et al., arXiv 2211.17192, equation 1 and theorem 3.8.
    """

    def __init__(self, block_size: int, student: Seconds | None, teacher: Seconds | None):
        self.block_size, self.student, self.teacher = block_size, student, teacher
        self.confirmed, self.drafted = 8.0, 10.0  # before anything is known

    def observe(self, confirmed: float, drafted: float) -> None:
        """Count drafted tokens of the teacher's, up to the first that it did not confirm."""
        self.confirmed += confirmed
        self.drafted += drafted

    def plan(self, students: int, teachers: int, cached: float) -> Plan:
        """The best plan for this many rows of each, of so many tokens on average; without speculation if no other is
        better."""
        T, agreement = self.block_size, self.confirmed / self.drafted
        best = Plan(T, speculates=False)
        if self.student is None or self.teacher is None or not teachers:
            return best
        rows = students + teachers
        alone = T * self.teacher(teachers, 1, cached)
        if students:
            alone += T * self.student(students, 1, cached) + self.teacher(students, T, cached)
        most, kept, drafting = rows * T / alone, 0.0, self.student(rows, 1, cached)
        for length in range(1, T + 1):
            kept += agreement ** (length - 1)
            seconds = length * drafting + self.teacher(rows, length, cached)
            tokens = (students * length + teachers * kept) / seconds
            if tokens > most:
                best, most = Plan(length, speculates=True), tokens
        return best


def speculation_of(
    student: PreTrainedModel | None, teacher: PreTrainedModel | None, block_size: int, is_compiled: bool
) -> Speculation:
    """The plans for a pair of models; none speculates where a model has recurrent states, for which it would have to
    read again what the teacher did confirm."""
    if any(model is not None and keeps_states(model.config) for model in (student, teacher)):
        return Speculation(block_size, None, None)

    def seconds(model: PreTrainedModel | None) -> PassTime | None:
        return None if model is None else PassTime(model, block_size if is_compiled else None)

    return Speculation(block_size, seconds(student), seconds(teacher))


def drafts_for(
    student: PreTrainedModel | None, teacher: PreTrainedModel | None, block_size: int, is_compiled: bool
) -> bool:
    """Whether the student drafts anything for a row that the teacher writes, without others and at its beginning. If
    not, it never does: how often they agree is then not observed."""
    return speculation_of(student, teacher, block_size, is_compiled).plan(0, 1, 0).speculates

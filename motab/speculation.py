"""Speculative decoding of the teacher's text: the student drafts it too, and the teacher checks a block in one pass.

Both choose the token of a position with that position's random number. The teacher's choices are kept up to the first
that was not drafted, so the text is the one that the teacher writes alone, token for token, in fewer of its passes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from transformers import PreTrainedModel

from motab.models import processes_sharing


class Plan(NamedTuple):
    """How the next round is written: the length of the student's draft, and whether it drafts the teacher's text."""

    length: int
    speculates: bool


class Speculation:
    """Plans rounds that yield the most tokens for their cost, from how often the teacher agreed so far.

    The unit of cost is a forward pass of the teacher. With a the share of drafted tokens that it confirms, a draft of T
    tokens for n rows that the student writes and m that the teacher writes yields

        (n T + m (1 - a^T) / (1 - a)) / (cost T + 1)

    tokens per unit. If the teacher writes its rows alone, it is (n + m) T / (cost T + 1 + T) with T the block size,
    without the passes for the student's rows, cost T + 1, if n = 0. That a pass over more tokens takes longer, as it
    does for many rows, is not counted.

    Args:
        block_size: the longest draft.
        cost: of a pass of the student, see `relative_cost`; infinity: never speculate.

    Source: Leviathan et al., arXiv 2211.17192, equation 1 and theorem 3.8.
    """

    def __init__(self, block_size: int, cost: float):
        self.block_size, self.cost = block_size, cost
        self.confirmed, self.drafted = 8.0, 10.0  # before anything is known

    def observe(self, confirmed: float, drafted: float) -> None:
        """Count drafted tokens of the teacher's, up to the first that it did not confirm."""
        self.confirmed += confirmed
        self.drafted += drafted

    def plan(self, students: int, teachers: int) -> Plan:
        """The best plan for this many rows of each; without speculation if no other is better."""
        T, agreement = self.block_size, self.confirmed / self.drafted
        alone = (self.cost * T + 1 if students else 0) + T
        best, most = Plan(T, speculates=False), (students + teachers) * T / alone
        kept = 0.0
        for length in range(1, T + 1) if teachers else ():
            kept += agreement ** (length - 1)
            tokens = (students * length + teachers * kept) / (self.cost * length + 1)
            if tokens > most:
                best, most = Plan(length, speculates=True), tokens
        return best


def drafts_for(
    student: PreTrainedModel | None, teacher: PreTrainedModel | None, block_size: int, is_compiled: bool
) -> bool:
    """Whether the student drafts anything where the teacher writes every row. If not at first, it never does: how often
    they agree is then not observed."""
    return Speculation(block_size, relative_cost(student, teacher, is_compiled)).plan(0, 1).speculates


def relative_cost(student: PreTrainedModel | None, teacher: PreTrainedModel | None, is_compiled: bool) -> float:
    """The time of the student's forward pass of a few tokens over the teacher's; infinity without one of them.

    Estimated and not measured, so that a run can be repeated exactly: as the models' weights in bytes, which a pass
    reads, or as their layers, whose kernels an uncompiled pass launches one by one, whichever ratio is larger.
    """
    if student is None or teacher is None:
        return math.inf
    ratio = _weight_bytes(student) / _weight_bytes(teacher)
    return ratio if is_compiled else max(ratio, _layers(student) / _layers(teacher))


def _weight_bytes(model: PreTrainedModel) -> float:
    """Of this process."""
    return sum(parameter.nbytes for parameter in model.parameters()) / processes_sharing(model)


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)

"""What the value of a step is, and on which side of its boundary it is safe."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple


class Score(NamedTuple):
    """A score of `motab_kernels`' boundaries: its name in words, and when it accepts a step."""

    label: str
    is_safe: Callable[[float, float], bool]  # of value and threshold


#: By name in `motab_kernels`.
SCORES = {
    "teacher_value": Score("value", operator.ge),
    "value_ratio": Score("value ratio (teacher : student)", operator.ge),
    "forward_kl": Score("KL(teacher || student)", operator.le),
    "reverse_kl": Score("KL(student || teacher)", operator.le),
    "teacher_rank": Score("teacher rank (0: likeliest)", operator.lt),
}


def label(score: str | None) -> str:
    """The name in words of a step's value."""
    return SCORES["teacher_value" if score is None else score].label


def agrees(score: str, value: float, threshold: float, accepted: bool) -> bool:
    """Whether a verdict follows from its value and threshold. Both were rounded after the verdict, so a value beyond
    the threshold may have become equal to it."""
    return SCORES[score].is_safe(value, threshold) == accepted or (not accepted and value == threshold)


def is_unbounded(score: str | None, threshold: float) -> bool:
    """Whether the step was scored without a threshold."""
    return score not in ("forward_kl", "reverse_kl", "teacher_rank") and threshold == 0

"""What the value of a step is, and on which side of its boundary it is safe."""

from __future__ import annotations

import operator

from motab_kernels.boundaries import IS_SAFE

#: What people call the scores of `motab_kernels`' boundaries.
LABELS = {
    "teacher_value": "value",
    "value_ratio": "value ratio (teacher : student)",
    "forward_kl": "KL(teacher || student)",
    "reverse_kl": "KL(student || teacher)",
    "teacher_rank": "teacher rank (0: likeliest)",
}


def label(score: str | None) -> str:
    """The name in words of a step's value."""
    return LABELS["teacher_value" if score is None else score]


def agrees(score: str, value: float, threshold: float, accepted: bool) -> bool:
    """Whether a verdict follows from its value and threshold. Both were rounded after the verdict, so a value beyond
    the threshold may have become equal to it."""
    return IS_SAFE[score](value, threshold) == accepted or (not accepted and value == threshold)


def is_unbounded(score: str | None, threshold: float) -> bool:
    """Whether the step was scored without a threshold."""
    return (score is None or IS_SAFE[score] is operator.ge) and threshold == 0

"""Who writes, who watches, and what happens when the student strays: the settings of one engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import motab_kernels as mk

Backtrack = Literal["td", "breach", "none"]


@dataclass(frozen=True)
class MotabPolicy:
    """The student writes, the teacher watches every step, takes over from the last safe state, and finishes.

    Source: MOTAB, arXiv 2605.19433. A step with value ``V`` (geometric mean teacher probability of its tokens)
    is accepted while ``V >= epsilon0 * exp(-theta * H)``, ``H`` the teacher's entropy in nats at its first token.

    Args:
        epsilon0: boundary at zero entropy, >= 0; useful 0.1 to 0.5. 0 accepts every step that is not NaN.
        theta: how much the teacher's uncertainty relaxes the boundary, >= 0; 0 is a static boundary.
        entropy_top_k: None for the exact entropy; k for that of the renormalised k likeliest tokens.
        backtrack: where the teacher starts after a breach at step t: ``"td"`` before the step whose value fell
            most, ``"breach"`` before step t, ``"none"`` after step t.
        stitch: the phrase between the student's flawed steps and the teacher's text in the training target;
            None leaves the flawed steps out instead.
        delimiter: the text that ends a step.
        max_interventions: how often the teacher may take over; only 1 (it writes to the end) so far.
    """

    epsilon0: float = 0.2
    theta: float = 1.0
    entropy_top_k: int | None = None
    backtrack: Backtrack = "td"
    stitch: str | None = "However,"
    delimiter: str = ".\n\n"
    max_interventions: int = 1

    def __post_init__(self) -> None:
        if self.backtrack not in ("td", "breach", "none"):
            raise ValueError(f'backtrack must be "td", "breach" or "none", got {self.backtrack!r}')
        if self.max_interventions != 1:
            raise ValueError(
                f"max_interventions must be 1 (the teacher writes to the end), got {self.max_interventions}"
            )
        if self.stitch is not None and not self.stitch.strip():
            raise ValueError(f"stitch must hold text, got {self.stitch!r}; None leaves the flawed steps out")
        self.boundary()  # refuses an epsilon0 or theta out of range

    def boundary(self) -> mk.EntropyBoundary:
        """The boundary that this policy holds the student to."""
        return mk.EntropyBoundary(self.epsilon0, self.theta, entropy_top_k=self.entropy_top_k)


@dataclass(frozen=True)
class OnPolicy:
    """The student writes all of it; a teacher, where one is given, scores its steps and never intervenes."""

    delimiter: str = ".\n\n"

    def boundary(self) -> mk.FixedBoundary:
        """A boundary that nothing but a NaN lies below, so that steps are scored."""
        return mk.FixedBoundary(0.0, score="teacher_value")


@dataclass(frozen=True)
class TeacherOnly:
    """The teacher writes all of it: off-policy distillation."""


Policy = MotabPolicy | OnPolicy | TeacherOnly

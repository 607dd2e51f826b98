"""Boundaries: what a step is held to.

B rows. Every boundary is one criterion: a step gets a *score* from its tokens, and at its first token a
*threshold*,

    threshold = scale * { exp(-theta * H_teacher) | 1 | mean of the last `window` accepted scores },

and is accepted while the score lies on the safe side of the threshold. NaN lies on neither side.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from motab_kernels.arguments import check_count, check_parameter
from motab_kernels.boundary_state import BoundaryState

#: Scores, and the comparison of a safe score with its threshold. In the order of the enum in cpu/boundary_walk.h.
IS_SAFE = {
    "teacher_value": operator.ge,
    "value_ratio": operator.ge,
    "forward_kl": operator.le,
    "reverse_kl": operator.le,
    "teacher_rank": operator.lt,
}
SCORES = tuple(IS_SAFE)


class Criterion(NamedTuple):
    """A boundary as the kernels see it."""

    score: str
    scale: float | Tensor
    theta: float | Tensor | None = None  # None: no entropy in the threshold
    top_k: int = 0  # 0: the entropy of the whole vocabulary
    window: int = 0  # 0: no history in the threshold


class Boundary:
    """What a step is held to: `EntropyBoundary`, `FixedBoundary` or `MovingAverageBoundary`."""

    @property
    def criterion(self) -> Criterion:
        raise NotImplementedError

    def new_state(self, batch_size: int, device: torch.device | str | None = None) -> BoundaryState:
        """A fresh `BoundaryState` for this boundary."""
        return BoundaryState(batch_size, device, window=self.criterion.window)


@dataclass(frozen=True, eq=False)
class EntropyBoundary(Boundary):
    """MOTAB's adaptive boundary: accept a step while `V >= epsilon0 * exp(-theta * H)`.

    `V = exp(mean teacher log-probability of the step's tokens)`, in [0, 1]. `H` is the entropy, in nats, of
    the teacher's distribution at the step's first position. Source: MOTAB, arXiv 2605.19433.

    Args:
        epsilon0: the threshold where the teacher's entropy is 0, >= 0; useful 0.1 to 0.5. Above 1, with `theta=0`,
            nothing is accepted. Float, or floating-point tensor, 0-d or (B,), on the logits' device.
        theta: how fast entropy lowers the threshold, >= 0; useful 0.5 to 2. 0 is a static boundary. Types as for
            `epsilon0`.
        entropy_top_k: compute `H` over the teacher's `k` likeliest tokens, renormalised, as the authors do with 20;
            this reads the teacher's logits a second time. None: over the whole vocabulary.

    Tensors are read on the device at every call, so that a captured CUDA graph follows a change in place.

    Raises:
        ValueError: a number out of range, or a tensor that is not floating-point or neither 0-d nor (B,).
    """

    epsilon0: float | Tensor = 0.2
    theta: float | Tensor = 1.0
    entropy_top_k: int | None = None

    def __post_init__(self) -> None:
        check_parameter("epsilon0", self.epsilon0, least=0)
        check_parameter("theta", self.theta, least=0)
        if self.entropy_top_k is not None:
            check_count("entropy_top_k", self.entropy_top_k)

    @property
    def criterion(self) -> Criterion:
        return Criterion("teacher_value", self.epsilon0, theta=self.theta, top_k=self.entropy_top_k or 0)


@dataclass(frozen=True, eq=False)
class FixedBoundary(Boundary):
    """Accept a step while its score is on the safe side of one threshold.

    | score | of a step | accepted while |
    |---|---|---|
    | `"teacher_value"` | exp(mean teacher log-probability), in [0, 1] | score >= threshold |
    | `"value_ratio"` | exp(mean(teacher - student log-probability)), >= 0 | score >= threshold |
    | `"forward_kl"` | mean KL(teacher || student), nats | score <= threshold |
    | `"reverse_kl"` | mean KL(student || teacher), nats | score <= threshold |
    | `"teacher_rank"` | largest number of teacher logits above a token's | score < threshold |

    `FixedBoundary(25, score="teacher_rank")` keeps tokens within the teacher's top 25.

    Args:
        threshold: float, or floating-point tensor, 0-d or (B,), on the logits' device; read there at every
            call.
        score: one of the above.

    Raises:
        ValueError: an unknown score, or a threshold that is not finite or of the wrong shape.
    """

    threshold: float | Tensor
    score: str = "teacher_value"

    def __post_init__(self) -> None:
        check_parameter("threshold", self.threshold)
        if self.score not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {self.score!r}")

    @property
    def criterion(self) -> Criterion:
        return Criterion(self.score, self.threshold)


@dataclass(frozen=True, eq=False)
class MovingAverageBoundary(Boundary):
    """AdaSwitch's boundary: accept while KL(teacher || student) <= `factor` * its recent mean.

    A step's score is its mean forward KL in nats; the threshold is `factor` times the mean score of the last
    `window` accepted steps, and +inf until there are that many. AdaSwitch itself takes every token as a step.

    Args:
        factor: >= 0. Float, or floating-point tensor, 0-d or (B,), on the logits' device; read there at every
            call.
        window: accepted steps to average over, >= 1.

    Raises:
        ValueError: a number out of range, or a tensor of the wrong shape.
    """

    factor: float | Tensor
    window: int

    def __post_init__(self) -> None:
        check_parameter("factor", self.factor, least=0)
        check_count("window", self.window)

    @property
    def criterion(self) -> Criterion:
        return Criterion("forward_kl", self.factor, window=self.window)

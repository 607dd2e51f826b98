"""Boundaries, and the state of a monitored row between calls.

B rows, T tokens. Every boundary is one rule: a step gets a *score* from its tokens, and at its first token a
*threshold*,

    threshold = scale * { exp(-theta * H_teacher) | 1 | mean of the last `window` accepted scores },

and is accepted while the score lies on the safe side of the threshold. NaN lies on neither side.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from motab_kernels.arguments import check_count, check_parameter

#: Scores, and the comparison of a safe score with its threshold. In the order of the enum in cpu/boundary_walk.h.
IS_SAFE = {
    "teacher_value": operator.ge,
    "value_ratio": operator.ge,
    "forward_kl": operator.le,
    "reverse_kl": operator.le,
    "teacher_rank": operator.lt,
}
SCORES = tuple(IS_SAFE)


class Rule(NamedTuple):
    """A boundary as the kernels see it."""

    score: str
    scale: float | Tensor
    theta: float | Tensor | None = None  # None: no entropy in the threshold
    top_k: int = 0  # 0: the entropy of the whole vocabulary
    window: int = 0  # 0: no history in the threshold


class Boundary:
    """What a step is held to: `EntropyBoundary`, `FixedBoundary` or `MovingAverageBoundary`."""

    @property
    def rule(self) -> Rule:
        raise NotImplementedError

    def new_state(self, batch_size: int, device: torch.device | str | None = None) -> BoundaryState:
        """A fresh `BoundaryState` for this boundary."""
        return BoundaryState(batch_size, device, window=self.rule.window)


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
    def rule(self) -> Rule:
        return Rule("teacher_value", self.epsilon0, theta=self.theta, top_k=self.entropy_top_k or 0)


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
    def rule(self) -> Rule:
        return Rule(self.score, self.threshold)


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
    def rule(self) -> Rule:
        return Rule("forward_kl", self.factor, window=self.window)


class BoundaryState:
    """The state of B rows between calls of `fused_kl_boundary`, in three tensors on the device.

    Calls may have any number of tokens: 16 calls of one token decide as one call of 16 does. Positions count a row's
    tokens, without padding, since the state was made or the row was last reset.

    Args:
        batch_size: B, >= 0.
        device: where the logits are; None is torch's default device.
        window: number of accepted scores to keep, `MovingAverageBoundary`'s `window`; 0 for the other boundaries.
            `boundary.new_state(batch_size, device)` sets it.
    """

    # Scores are double, so that blocks of any length add up to the same sums.
    TOKENS, STEPS, BREACH_POSITION, ROLLBACK_POSITION = 0, 2, 4, 5

    def __init__(self, batch_size: int, device: torch.device | str | None = None, window: int = 0) -> None:
        check_count("batch_size", batch_size, minimum=0)
        check_count("window", window, minimum=0)
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._counters = torch.zeros(batch_size, 6, dtype=torch.int32, device=device)
            self._counters[:, self.BREACH_POSITION :] = -1
            self._scores = torch.zeros(batch_size, 5, dtype=torch.float64, device=device)
            self._history = torch.zeros(batch_size, window, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, counters: Tensor, scores: Tensor, history: Tensor) -> BoundaryState:
        """The state in these tensors, which it shares.

        Raises:
            ValueError: another shape, dtype or device than those of a fresh state, or strides with gaps.
        """
        state = cls.__new__(cls)
        state._counters, state._scores, state._history = counters, scores, history
        B, window = len(counters), history.shape[-1]
        for name, columns, dtype in (
            ("counters", 6, torch.int32),
            ("scores", 5, torch.float64),
            ("history", window, torch.float64),
        ):
            x: Tensor = getattr(state, name)
            if x.dtype != dtype or x.shape != (B, columns) or x.device != counters.device or not x.is_contiguous():
                expected = f"contiguous {dtype} of shape {(B, columns)} on {counters.device}"
                got = f"{x.dtype} of shape {tuple(x.shape)}, strides {x.stride()}, on {x.device}"
                raise ValueError(f"{name}: expected {expected}, got {got}")
        return state

    # Not to be replaced by others: kernels take their shapes and dtypes for granted.
    @property
    def counters(self) -> Tensor:
        """(B, 6) int32: tokens, step tokens, steps, fall start, breach position, rollback position."""
        return self._counters

    @property
    def scores(self) -> Tensor:
        """(B, 5) float64: step total, score, threshold, safety, fall."""
        return self._scores

    @property
    def history(self) -> Tensor:
        """(B, window) float64: the last accepted scores."""
        return self._history

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """`counters`, `scores` and `history`, as `of` takes them."""
        return self._counters, self._scores, self._history

    @property
    def breached(self) -> Tensor:
        """(B,) bool: the row has breached, and is frozen until `reset_`."""
        return self.breach_position >= 0

    @property
    def breach_position(self) -> Tensor:
        """(B,) int32, a view: tokens up to and including the breaching step; -1 if none breached."""
        return self.counters[:, self.BREACH_POSITION]

    @property
    def rollback_position(self) -> Tensor:
        """(B,) int32, a view: tokens before step t*, those to keep; -1 if no step breached."""
        return self.counters[:, self.ROLLBACK_POSITION]

    @property
    def tokens(self) -> Tensor:
        """(B,) int32, a view: tokens counted. A breached row counts none."""
        return self.counters[:, self.TOKENS]

    @property
    def steps(self) -> Tensor:
        """(B,) int32, a view: steps accepted; in a breached row the index t of the breaching step."""
        return self.counters[:, self.STEPS]

    def reset_(self, rows: Tensor | Sequence[int] | None = None) -> BoundaryState:
        """Reset all rows or some, in place; the host does not wait if `rows` is on the device.

        Args:
            rows: None for all; a (B,) bool tensor; an integer tensor or a sequence of row indices.

        Returns:
            The state itself.

        Raises:
            ValueError: `rows` of another shape, dtype or device; an index outside the batch, in a sequence or in a
                tensor on the CPU.
        """
        B = self.counters.shape[0]
        if rows is None:
            rows = torch.ones(B, dtype=torch.bool, device=self.counters.device)
        elif not isinstance(rows, Tensor):
            rows = torch.tensor(_indices(rows, B), dtype=torch.int64, device=self.counters.device)
        if rows.device != self.counters.device:
            raise ValueError(f"rows: expected a tensor on {self.counters.device}, got one on {rows.device}")
        if rows.dtype == torch.bool:
            if rows.shape != (B,):
                raise ValueError(f"rows: expected a bool tensor of shape ({B},), got {tuple(rows.shape)}")
            # Unlike indexing with a mask, filling under it does not need the number of chosen rows on the host.
            chosen = rows[:, None]
            self.counters.masked_fill_(chosen, 0)
            self.counters[:, self.BREACH_POSITION :].masked_fill_(chosen, -1)
            self.scores.masked_fill_(chosen, 0)
            self.history.masked_fill_(chosen, 0)
        elif rows.dtype in (torch.int32, torch.int64) and rows.dim() <= 1:
            rows = rows.reshape(-1).long()
            if rows.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the host would wait
                _indices(rows.tolist(), B)
            self.counters.index_fill_(0, rows, 0)
            self.counters[:, self.BREACH_POSITION :].index_fill_(0, rows, -1)
            self.scores.index_fill_(0, rows, 0)
            self.history.index_fill_(0, rows, 0)
        else:
            got = f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise ValueError(f"rows: expected a (B,) bool tensor or a 1-d integer tensor, got {got}")
        return self

    def __repr__(self) -> str:
        B, window = self.history.shape
        return f"BoundaryState(batch_size={B}, device='{self.counters.device}', window={window})"


def _indices(rows: Sequence[int], B: int) -> list[int]:
    """Numbers of rows as ints; bool, an int to Python, is refused."""
    try:
        found = [B if isinstance(row, bool) else operator.index(row) for row in rows]
    except TypeError:  # neither a sequence nor of integers
        found = [B]
    if not all(-B <= row < B for row in found):
        raise ValueError(f"rows: expected indices into {B} rows, a ({B},) bool tensor or None, got {rows!r}")
    return found

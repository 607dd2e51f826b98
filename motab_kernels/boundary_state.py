"""The state of a monitored row between calls of `fused_kl_boundary`. B rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from motab_kernels.arguments import check_count


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

    TOKENS, STEPS, BREACH_POSITION, ROLLBACK_POSITION = 0, 2, 4, 5

    def __init__(self, batch_size: int, device: torch.device | str | None = None, window: int = 0) -> None:
        check_count("batch_size", batch_size, minimum=0)
        check_count("window", window, minimum=0)
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._counters = torch.zeros(batch_size, 6, dtype=torch.int32, device=device)
            self._counters[:, self.BREACH_POSITION :] = -1
            # Double, so that blocks of any length add up to the same sums.
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
        positions = self.counters[:, self.BREACH_POSITION :]
        fresh = (self.counters, 0), (positions, -1), (self.scores, 0), (self.history, 0)
        if rows.dtype == torch.bool:
            if rows.shape != (B,):
                raise ValueError(f"rows: expected a bool tensor of shape ({B},), got {tuple(rows.shape)}")
            # Unlike indexing with a mask, filling under it does not need the number of chosen rows on the host.
            for x, value in fresh:
                x.masked_fill_(rows[:, None], value)
        elif rows.dtype in (torch.int32, torch.int64) and rows.dim() <= 1:
            rows = rows.reshape(-1).long()
            if rows.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the host would wait
                _indices(rows.tolist(), B)
            for x, value in fresh:
                x.index_fill_(0, rows, value)
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

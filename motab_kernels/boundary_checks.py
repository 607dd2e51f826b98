"""Checks of the arguments of `fused_kl_boundary`, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motab_kernels.arguments import DIVISORS, check_logits, check_values_of, check_whole
from motab_kernels.boundary_state import BoundaryState


def check_workspace(workspace: Tensor, numel: int, device: torch.device) -> None:
    fits = workspace.dtype == torch.float32 and workspace.device == device and workspace.is_contiguous()
    if not fits or workspace.numel() < numel:
        expected = f"at least {numel} contiguous float32 on {device}: see boundary_workspace"
        got = f"{workspace.numel()} {workspace.dtype} on {workspace.device}"
        raise ValueError(f"workspace: expected {expected}, got {got}")


def check_tensors(student: Tensor, teacher: Tensor, token_ids: Tensor, step_ends: Tensor | None) -> None:
    check_logits(student, teacher)
    leading = student.shape[:-1]
    if teacher.shape[:-1] != leading:
        expected, got = (*leading, "V"), tuple(teacher.shape)
        raise ValueError(f"teacher_logits: expected the student's leading shape, {expected}, got {got}")
    _check("token_ids", token_ids, leading, torch.int64, student.device)
    _check("teacher_logits", teacher, teacher.shape, teacher.dtype, student.device)
    if step_ends is not None:
        _check("step_ends", step_ends, leading, torch.bool, student.device)


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_whole(name, x)
    if x.shape != shape or x.dtype != dtype or x.device != device:
        expected = f"{dtype} of shape {tuple(shape)} on {device}"
        got = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_state(state: BoundaryState, B: int, window: int, device: torch.device) -> None:
    if not isinstance(state, BoundaryState):
        raise ValueError(f"state: expected a BoundaryState, got {type(state).__name__}")
    history = state.history
    if history.shape != (B, window) or history.device != device:
        expected = f"one for {B} rows with window {window} on {device}: boundary.new_state({B}, device)"
        raise ValueError(f"state: expected {expected}, got {state!r}")


def check_out(out: Sequence[Tensor], names: Sequence[str], dtypes: Sequence[torch.dtype], token_ids: Tensor) -> None:
    shape, device = token_ids.shape, token_ids.device
    for name, x, dtype in zip(names, out, dtypes, strict=True):
        if x.shape != shape or x.dtype != dtype or x.device != device:
            _check(f"out.{name}", x, shape, dtype, device)  # which raises: a name made for each would take longer
        if not x.is_contiguous():
            raise ValueError(f"out.{name}: expected a contiguous tensor, got strides {x.stride()}")


def check_values(token_ids: Tensor, temperature: Tensor | None, V: int) -> None:
    """Values, which are checked on the CPU only."""
    outside = (token_ids < -1) | (token_ids >= V)
    if outside.any():
        raise ValueError(f"token_ids: expected -1 or 0 to {V - 1}, got {token_ids[outside][0].item()}")
    if temperature is not None:
        check_values_of("temperature", temperature, *DIVISORS)

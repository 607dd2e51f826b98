"""Tensors as the C++ kernels take them: 8-byte numbers, in the order of arguments.h."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def logits(x: Tensor | None) -> tuple[int, ...]:
    """(B, T, V) or (B, V), contiguous in V."""
    if x is None:
        return 0, 0, 0, 0
    return x.data_ptr(), TYPES[x.dtype], x.stride(0), x.stride(1) if x.dim() == 3 else 0


def parameter(x: Tensor | None) -> tuple[int, ...]:
    """0-d or (B,), float32 or float64."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0) if x.dim() else 0, x.dtype == torch.float64)


def widened(x: float | Tensor | None) -> Tensor | None:
    """x in float64 unless it is float32. The caller keeps the result until the call is over."""
    if x is None or (isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)):
        return x
    return torch.as_tensor(x, dtype=torch.float64)

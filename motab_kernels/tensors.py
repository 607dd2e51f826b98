"""Dtypes and conversions of tensors that the ops have in common. It imports torch alone: any file may use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)  # "torch" takes float64 too
_PLAIN = frozenset((Tensor, torch.nn.Parameter, float, int, type(None)))


def on_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """The numbers as int64, in one transfer, from pinned memory: the host would wait for a copy from other memory."""
    host = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def is_traced(*arguments: Any) -> bool:
    """Whether a call is traced, compiled, transformed or intercepted, so that it must go through the registered op, and
    no tensor that is made in it may outlive it. Arguments that are no tensors do not matter."""
    return (
        torch.compiler.is_compiling()
        or (not _PLAIN.issuperset(map(type, arguments)) and any(map(_is_special, arguments)))
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.maybe_current_level() is not None  # of torch.func
        or torch.jit.is_tracing()
    )


def is_batched(x: Tensor) -> bool:
    """Whether vmap, or autograd with `is_grads_batched`, has added a dimension that the tensor does not show."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def _is_special(x: Any) -> bool:
    return isinstance(x, Tensor) and type(x) not in _PLAIN


def as_normal(x: Tensor) -> Tensor:
    """A tensor that was made in inference mode as one that autograd can save, of the same memory."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(
        x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    )


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 if one of the tensors is."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def with_tokens(x: Tensor, dims: int = 3) -> Tensor:
    """(B, V) as (B, 1, V); with 2 `dims`, (B,) as (B, 1)."""
    return x if x.dim() == dims else x.unsqueeze(1)

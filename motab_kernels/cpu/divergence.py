"""`divergence_loss` in C++, on as many threads as torch uses.

The functions are those of `DivergenceKernels`; a slice is a split of SPLIT columns.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from motab_kernels.cpu.arguments import logits, parameter, widened
from motab_kernels.cpu.library import kernels
from motab_kernels.divergence_sums import DIVERGENCES

SPLIT = 4096  # columns, as in splits.h
CALL = struct.Struct("23q")  # `DivergenceCall` in divergence.cpp


def _call(
    function: str,
    shape: tuple[int, int, int],
    tau: Tensor | None,
    kind: str,
    *numbers: object,
    sides: tuple[Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
    saved: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    # These names keep new tensors alive until the call is over.
    student, teacher = (None, None) if sides is None else (x if x.stride(-1) == 1 else x.contiguous() for x in sides)
    tau = widened(tau)
    call = CALL.pack(
        *shape,
        torch.get_num_threads(),
        DIVERGENCES.index(kind),
        *logits(student),
        *logits(teacher),
        *parameter(tau),
        *(0 if x is None else x.data_ptr() for x in (keep, saved, scale)),
        *logits(out),
    )
    getattr(kernels(), f"motab_divergence_{function}")(call, *numbers)


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _shares(lam: float) -> tuple[ctypes.c_float, ctypes.c_float]:
    return ctypes.c_float(lam), ctypes.c_float(1 - lam)


def _splits(V: int) -> int:
    return -(-V // SPLIT)


def divergence_sums(student: Tensor, teacher: Tensor, tau: Tensor | None, keep: Tensor | None, kind: str) -> Tensor:
    B, T, V = student.shape
    sums = student.new_empty((B * T, 6, _splits(V)), dtype=torch.float32)
    _call("sums", (B, T, V), tau, kind, _pointer(sums), sides=(student, teacher), keep=keep)
    return sums


def finish(sums: Tensor, tau: Tensor | None, keep: Tensor | None, kind: str, T: int) -> tuple[Tensor, Tensor]:
    R, _, S = sums.shape
    loss, saved = (sums.new_empty(size, dtype=torch.float32) for size in ((R,), (R, 6)))
    shape = R // max(1, T), T, 0
    _call("finish", shape, tau, kind, _pointer(sums), ctypes.c_int64(S), _pointer(loss), keep=keep, saved=saved)
    return loss, saved


def divergence_terms(
    student: Tensor, teacher: Tensor, tau: Tensor | None, keep: Tensor | None, saved: Tensor, kind: str, lam: float
) -> Tensor:
    B, T, V = student.shape
    terms = student.new_empty((B * T, 2, _splits(V)), dtype=torch.float32)
    numbers = *_shares(lam), _pointer(terms)
    _call("terms", (B, T, V), tau, kind, *numbers, sides=(student, teacher), keep=keep, saved=saved)
    return terms


def divergence_gradient(
    student: Tensor,
    teacher: Tensor,
    tau: Tensor | None,
    saved: Tensor,
    scale: Tensor,
    kind: str,
    lam: float,
    out: Tensor,
    softcap: float = 0.0,
) -> None:
    B, T, V = student.shape
    sides, scale = (student, teacher), scale.float()
    numbers = *_shares(lam), ctypes.c_float(1 / softcap if softcap else 0)
    _call("gradient", (B, T, V), tau, kind, *numbers, sides=sides, saved=saved, scale=scale, out=out)

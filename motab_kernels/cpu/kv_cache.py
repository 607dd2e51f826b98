"""Rows of a left-padded key-value cache, cut and end-aligned again, in C++: all layers in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from motab_kernels.cpu.library import kernels


def realign_(
    storages: Sequence[Tensor], starts: Sequence[int], lengths: Sequence[int], width: int, *, clear_padding: bool
) -> None:
    """Realign every storage (B, H, S, D), contiguous along D, on as many threads as torch uses. In place."""

    def numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(values))(*values)

    table = [
        number
        for x in storages
        for number in (
            x.data_ptr(),
            *(stride * x.element_size() for stride in x.stride()[:3]),
            x.shape[1],
            x.shape[3] * x.element_size(),
        )
    ]
    kernels().motab_realign(
        numbers(table),
        ctypes.c_int64(len(storages)),
        numbers(starts),
        numbers(lengths),
        ctypes.c_int64(len(starts)),
        ctypes.c_int64(width),
        ctypes.c_int64(clear_padding),
        ctypes.c_int64(torch.get_num_threads()),
    )

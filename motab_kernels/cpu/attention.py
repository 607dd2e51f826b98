"""`ragged_attention` in C++: one call, on as many threads as torch uses."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from motab_kernels.cpu.arguments import TYPES
from motab_kernels.cpu.library import kernels

CALL = struct.Struct("29q2d")  # `AttentionCall` in attention.cpp


def _heads(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.stride()[:3]


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    out: Tensor,
) -> None:
    """Write `out` (b, H_q, T, D), contiguous in D. `softcap` 0: none; `page_table` None: row i lies in page i."""
    b, H_q, T, D = query.shape
    # These names keep new tensors alive until the call is over.
    lengths = lengths.contiguous()
    page_table = None if page_table is None else page_table.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    call = CALL.pack(
        b,
        H_q,
        keys.shape[1],
        T,
        D,
        TYPES[query.dtype],
        torch.get_num_threads(),
        *_heads(query),
        *_heads(keys),
        *_heads(values),
        *_heads(out),
        *(0 if x is None else x.data_ptr() for x in (lengths, page_table, sinks)),
        1 if page_table is None else page_table.shape[1],
        keys.shape[2],
        window,
        scale,
        softcap,
    )
    if not kernels().motab_ragged_attention(call):
        raise MemoryError("ragged_attention: no memory for its sums")

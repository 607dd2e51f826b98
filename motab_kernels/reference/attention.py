"""Definition of `ragged_attention` in plain PyTorch.

b rows of queries, T new tokens, H_q and H heads of queries and of keys, D head size; pages of S slots, n of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motab_kernels.tensors import wide_dtype


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
    """Write `out` (b, H_q, T, D), a row at a time; `softcap` 0 is none, no `page_table` is row i in page i."""
    T, dtype = query.shape[2], wide_dtype(query)
    repeats = query.shape[1] // keys.shape[1]
    S = keys.shape[2]
    if page_table is None:
        page_table = torch.arange(len(query), device=query.device)[:, None]
    lengths = lengths.clamp(0, page_table.shape[1] * S - T)
    for i, length in enumerate(lengths.tolist()):
        begin, end = max(0, length + 1 - window), length + T
        first = begin // S
        pages = page_table[i, first : (end - 1) // S + 1]
        seen = slice(begin - first * S, end - first * S)
        k, v = (torch.cat(list(x[pages]), 1)[:, seen].to(dtype).repeat_interleave(repeats, 0) for x in (keys, values))
        scores = scale * query[i].to(dtype) @ k.mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        slot = torch.arange(begin, end, device=query.device)
        behind = slot[-T:, None] - slot
        scores = scores.masked_fill((behind < 0) | (behind >= window), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, T, 1)], -1)
        out[i] = (scores.softmax(-1)[..., : end - begin] @ v).to(out.dtype)

"""Definition of `ragged_attention` in plain PyTorch.

b rows of queries, B rows of the cache, T new tokens, H_q and H heads of queries and of keys, S slots, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    out: Tensor,
) -> None:
    """Write `out` (b, H_q, T, D), a row at a time; `softcap` 0 is none."""
    T, dtype = query.shape[2], torch.promote_types(query.dtype, torch.float32)
    repeats = query.shape[1] // keys.shape[1]
    lengths = lengths.clamp(0, keys.shape[2] - T)
    row_of = range(len(query)) if rows is None else rows.tolist()
    for i, (row, length) in enumerate(zip(row_of, lengths.tolist(), strict=True)):
        begin, end = max(0, length + 1 - window), length + T
        k, v = (x[row, :, begin:end].to(dtype).repeat_interleave(repeats, 0) for x in (keys, values))
        scores = scale * query[i].to(dtype) @ k.mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        slot = torch.arange(begin, end, device=query.device)
        behind = slot[-T:, None] - slot
        scores = scores.masked_fill((behind < 0) | (behind >= window), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, T, 1)], -1)
        out[i] = (scores.softmax(-1)[..., : end - begin] @ v).to(out.dtype)

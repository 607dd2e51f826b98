"""Definition of `sample_from_logits` in plain PyTorch. B rows, T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from motab_kernels.tensors import wide_dtype


def sample_from_logits(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    tokens: Tensor,
    valid: Tensor,
) -> None:
    """Write `tokens` and `valid`, (B,) or (B, T), from logits (..., V) and uniforms (...)."""
    x = logits.to(wide_dtype(logits))
    V = x.shape[-1]
    if 0 < top_k < V:
        x = x.masked_fill(x < x.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered = x.sort(-1, descending=True).values
        sums = _weights(ordered, temperature).cumsum(-1)
        last = torch.searchsorted(sums, top_p * sums[..., -1:]).clamp(max=V - 1)
        x = x.masked_fill(x < ordered.gather(-1, last), -torch.inf)
    weights = _weights(x, temperature)
    if min_p > 0:
        weights = weights.masked_fill(weights < min_p, 0)
    sums = weights.cumsum(-1)
    found = torch.searchsorted(sums, uniforms[..., None] * sums[..., -1:], right=True)[..., 0]
    torch.gt(sums[..., -1], 0, out=valid)  # the sum is NaN if a logit is, or if the largest is not finite
    tokens.copy_(found.where(valid, 0))


def _weights(x: Tensor, temperature: float) -> Tensor:
    """Of each token, relative to the likeliest one's; in float64."""
    return torch.exp((x - x.amax(-1, keepdim=True)) / temperature).double()

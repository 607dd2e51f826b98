"""Definition of `sample_from_logits` in plain PyTorch. B rows, T tokens, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from motab_kernels.sampling_checks import SETTINGS
from motab_kernels.tensors import wide_dtype


def sample_from_logits(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    tokens: Tensor,
    valid: Tensor,
) -> None:
    """Write `tokens` and `valid`, (B,) or (B, T), from logits (..., V) and uniforms (...).

    A setting is a number or a tensor (B,).
    """
    x = logits.to(wide_dtype(logits))
    V = x.shape[-1]
    settings: list[Any] = [_column(s, x) if isinstance(s, Tensor) else s for s in (temperature, top_k, top_p, min_p)]
    temperature, top_k, top_p, min_p = settings
    if isinstance(temperature, Tensor):
        greedy = temperature == 0
        first = torch.arange(V, device=x.device) == x.argmax(-1, keepdim=True)
        x = x.masked_fill(greedy & ~first, -torch.inf)
        temperature = temperature.to(x.dtype).masked_fill(greedy, 1)
    if isinstance(top_k, Tensor):
        last = top_k.long().where((top_k > 0) & (top_k < V), V) - 1
        least = x.sort(-1, descending=True).values.gather(-1, last.expand(*x.shape[:-1], 1))
        x = x.masked_fill(x < least, -torch.inf)
    elif 0 < top_k < V:
        x = x.masked_fill(x < x.topk(top_k).values[..., -1:], -torch.inf)
    if isinstance(top_p, Tensor):
        top_p = top_p.double().masked_fill(top_p == 1, torch.inf)  # a sum that is not reached
    if isinstance(top_p, Tensor) or top_p < 1:
        ordered = x.sort(-1, descending=True).values
        sums = _weights(ordered, temperature).cumsum(-1)
        last = torch.searchsorted(sums, top_p * sums[..., -1:]).clamp(max=V - 1)
        x = x.masked_fill(x < ordered.gather(-1, last), -torch.inf)
    weights = _weights(x, temperature)
    if isinstance(min_p, Tensor) or min_p > 0:
        weights = weights.masked_fill(weights < min_p, 0)
    sums = weights.cumsum(-1)
    found = torch.searchsorted(sums, uniforms[..., None] * sums[..., -1:], right=True)[..., 0]
    torch.gt(sums[..., -1], 0, out=valid)  # the sum is NaN if a logit is, or if the largest is not finite
    for setting, value in zip(SETTINGS, settings, strict=True):
        if isinstance(value, Tensor):
            valid &= setting.holds(value)[..., 0]
    tokens.copy_(found.where(valid, 0))


def _weights(x: Tensor, temperature: float | Tensor) -> Tensor:
    """Of each token, relative to the likeliest one's; in float64."""
    return torch.exp((x - x.amax(-1, keepdim=True)) / temperature).double()


def _column(setting: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1) or (B, 1, 1)."""
    return setting.view(-1, *(1,) * (x.dim() - 1))

"""The sums over the vocabulary that the losses need, and how the sums of its slices are combined.

With tau the temperature, x_t = (t - max t) / tau and w_t = exp(x_t) of the teacher's logits t, x_s and w_s of the
student's, the sums of a slice are

    max t      z_t = sum w_t      g_t = sum w_t (x_t - x_s)      max s      z_s = sum w_s      g_s = sum w_s (x_t - x_s)

and of the whole vocabulary

    forward_kl = g_t / z_t - log(z_t / z_s)        reverse_kl = log(z_t / z_s) - g_s / z_s.

Every other kind needs z_t and z_s before it can sum. A sum that the kind does not need may have any value.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of the tensor that is saved for the backward pass, 24 bytes a position. They keep the normalisers in a form in
# which neither p = exp(x_t) / z_t nor log(p / q) = (t - s - (max t - max s)) / tau - log(z_t / z_s) is rounded twice.
TOP_T, TOP_S, RECIPROCAL_T, RECIPROCAL_S, LOG_RATIO, CENTRE = range(6)

# In the order of the enum in cpu/divergence.cpp.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


def by_position(tau: Tensor, T: int) -> Tensor:
    """One temperature per row, (B,), to one per position, (B * T,); one for all rows, 0-d, as it is."""
    return tau[:, None].expand(-1, T).flatten() if tau.dim() else tau


def merge_sums(parts: Tensor, tau: Tensor | None, T: int) -> Tensor:
    """Sums (R, 6, S) of S slices to those of all, (R, 6); `tau` is the temperature, 0-d or (B,), None: 1."""
    top_t, z_t, g_t, top_s, z_s, g_s = parts.unbind(1)
    all_t, all_s = top_t.amax(-1), top_s.amax(-1)
    d_t, d_s = top_t - all_t[:, None], top_s - all_s[:, None]  # a maximum moves down by this
    if tau is not None:
        tau = by_position(tau, T).to(d_t.dtype).expand(len(d_t))[:, None]
        d_t, d_s = d_t / tau, d_s / tau
    f_t, f_s = d_t.exp(), d_s.exp()

    def moved(f: Tensor, g: Tensor, z: Tensor) -> Tensor:
        return torch.where(f == 0, 0.0, f * (g + (d_t - d_s) * z)).sum(-1)

    return torch.stack(
        (all_t, (f_t * z_t).sum(-1), moved(f_t, g_t, z_t), all_s, (f_s * z_s).sum(-1), moved(f_s, g_s, z_s)), 1
    )

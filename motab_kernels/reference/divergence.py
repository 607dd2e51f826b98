"""Definition of `divergence_loss` in plain PyTorch: sums, losses and gradients over rows of logits.

B rows, T tokens, V shared vocabulary (or a slice of it), R = B * T positions. With p, q the teacher's and the
student's distributions at a position, m = lam p + (1 - lam) q, and g the derivative of the divergence by q:

    kind               divergence                                    g
    forward_kl         sum p log(p / q)                              - p / q
    reverse_kl         sum q log(q / p)                              log(q / p)
    jsd                lam sum p log(p / m) + (1 - lam) sum q log(q / m)     (1 - lam) log(q / m)
    skew_forward_kl    sum p log(p / m)                              - (1 - lam) p / m
    skew_reverse_kl    sum q log(q / m)                              log(q / m) - (1 - lam) q / m
    tvd                1/2 sum |p - q|                               1/2 sign(q - p)

where 0 log 0 = 0 and p log(p / 0) = inf. By a student's logit s, which q has as q(s) = softmax(s / tau), the
derivative is q (g - sum q g) / tau, zero where s = -inf. For forward_kl that is (q - p) / tau.

A position is *invalid* where a side's softmax does not exist (NaN or +inf among its logits, or no finite one): its
loss and its gradient are NaN. Low-precision logits are read in float32, float64 in float64.

The functions without a docstring are those of `DivergenceKernels`, with all columns in one slice (S = 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from motab_kernels.divergence_sums import (
    CENTRE,
    LOG_RATIO,
    RECIPROCAL_S,
    RECIPROCAL_T,
    TOP_S,
    TOP_T,
    by_position,
    merge_sums,
)
from motab_kernels.reference.rows import CHUNK, row_sums
from motab_kernels.tensors import wide_dtype


def chunks(student: Tensor, teacher: Tensor, tau: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For some positions at a time: their slice of the R, student's and teacher's logits, and temperatures (r, 1)."""
    B, T, V = student.shape
    dtype = wide_dtype(student, teacher)
    tau = torch.ones((), device=student.device) if tau is None else by_position(tau, T)
    tau = tau.to(dtype).expand(B * T)[:, None]
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    rows = max(1, CHUNK // max(1, V))
    for start in range(0, B * T, rows):
        part = slice(start, start + rows)
        yield part, student[part].to(dtype), teacher[part].to(dtype), tau[part]


def product(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, and 0 for a weight of 0, even if the value is inf."""
    return torch.where(weight == 0, 0.0, weight * value)


def divergence_sums(student: Tensor, teacher: Tensor, tau: Tensor | None, keep: Tensor | None, kind: str) -> Tensor:
    parts = []
    for _, s, t, tau_r in chunks(student, teacher, tau):
        # Finite, because a slice may lack finite logits where its row has some.
        top_s, top_t = (x.amax(-1).clamp_min(torch.finfo(x.dtype).min) for x in (s, t))
        x_s, x_t = (s - top_s[:, None]) / tau_r, (t - top_t[:, None]) / tau_r
        w_s, w_t = x_s.exp(), x_t.exp()
        g_t = row_sums(product(w_t, x_t - x_s)) if kind == "forward_kl" else torch.zeros_like(top_t)
        g_s = row_sums(product(w_s, x_t - x_s)) if kind == "reverse_kl" else torch.zeros_like(top_s)
        sums = (top_t, row_sums(w_t), g_t, top_s, row_sums(w_s), g_s)
        parts.append(torch.stack(sums, -1))
    return torch.cat(parts)[..., None]


def finish(sums: Tensor, tau: Tensor | None, keep: Tensor | None, kind: str, T: int) -> tuple[Tensor, Tensor]:
    top_t, z_t, g_t, top_s, z_s, g_s = merge_sums(sums, tau, T).unbind(1)
    # A side without a softmax: NaN or +inf makes z NaN, no finite logit makes it 0.
    log_ratio = (z_t / z_s).log().masked_fill(~((z_t > 0) & (z_s > 0)), torch.nan)
    loss = g_t / z_t - log_ratio if kind == "forward_kl" else log_ratio - g_s / z_s
    loss = torch.where(loss < 0, 0.0, loss)  # rounding; NaN stays
    saved = torch.stack((top_t, top_s, 1 / z_t, 1 / z_s, log_ratio, loss), 1)
    return loss if keep is None else loss.masked_fill(~keep, 0), saved


def distributions(s: Tensor, t: Tensor, tau: Tensor, saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and log(p / q) of (r, V) logits, from the row's normalisers; the last 0 where neither has probability."""
    top_t, top_s = saved[:, TOP_T, None], saved[:, TOP_S, None]
    p = ((t - top_t) / tau).exp() * saved[:, RECIPROCAL_T, None]
    q = ((s - top_s) / tau).exp() * saved[:, RECIPROCAL_S, None]
    # Not log p - log q: where p and q nearly agree, the rounding of the two would exceed their difference.
    gap = torch.where(t == s, 0.0, t - s) / tau - ((top_t - top_s) / tau + saved[:, LOG_RATIO, None])
    return p, q, gap


def by_mixture(gap: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m) for m = lam p + (1 - lam) q, accurate also where p and q nearly agree."""
    gap = gap.clamp(-200, 200)  # beyond, the smaller is 0 to rounding; inf * 0 would be NaN
    # The shares in the mixture of the larger and the smaller of p and q. In float32 1 - (1 - 1e-9) would be 0, and
    # torch.where gives two numbers torch's default dtype.
    of_p, of_q = gap.new_full((), lam), gap.new_full((), 1 - lam)
    larger, smaller = torch.where(gap > 0, of_p, of_q), torch.where(gap > 0, of_q, of_p)
    # m over the larger of p and q is 1 + less, of which either form keeps the digits: near 1 and near 0.
    less = smaller * torch.expm1(-gap.abs())
    log_m = torch.where(less > -0.5, torch.log1p(less), torch.log(larger + smaller * torch.exp(-gap.abs())))
    log_p_m = torch.where(gap > 0, 0.0, gap) - log_m
    log_q_m = torch.where(gap > 0, -gap, 0.0) - log_m
    return log_p_m, log_q_m


def terms_and_slopes(p: Tensor, q: Tensor, gap: Tensor, kind: str, lam: float) -> tuple[Tensor, Tensor]:
    """Each column's term of the divergence, and g up to a constant: p / m - 1 and q / m - 1 keep the digits that p / m
    and q / m would lose. m - p is added to p log(p / m), and m - q to q log(q / m): it is 0 in sum and keeps each term
    positive, so that little is lost where p and q nearly agree."""
    if kind == "tvd":
        return (p - q).abs() / 2, -torch.where(gap.isnan(), gap, gap.sign()) / 2
    log_p_m, log_q_m = by_mixture(gap, lam)
    if kind == "jsd":
        return lam * p * log_p_m + (1 - lam) * q * log_q_m, (1 - lam) * log_q_m
    if kind == "skew_forward_kl":
        return p * log_p_m + (1 - lam) * (q - p), -(1 - lam) * log_p_m.expm1()
    return q * log_q_m + lam * (p - q), log_q_m - (1 - lam) * log_q_m.expm1()


def divergence_terms(
    student: Tensor, teacher: Tensor, tau: Tensor | None, keep: Tensor | None, saved: Tensor, kind: str, lam: float
) -> Tensor:
    parts = []
    for part, s, t, tau_r in chunks(student, teacher, tau):
        p, q, gap = distributions(s, t, tau_r, saved[part])
        terms, slopes = terms_and_slopes(p, q, gap, kind, lam)
        parts.append(torch.stack((row_sums(terms), row_sums(q * slopes)), -1))
    terms = torch.cat(parts)[..., None]
    return terms if keep is None else terms.masked_fill(~keep[:, None, None], 0)


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
    flat = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    rows = flat.view(-1, out.shape[-1])
    for part, s, t, tau_r in chunks(student, teacher, tau):
        p, q, gap = distributions(s, t, tau_r, saved[part])
        centre = saved[part, CENTRE, None]
        if kind == "forward_kl":
            result = torch.where(gap.abs() < 0.5, -q * torch.expm1(gap), q - p)
        elif kind == "reverse_kl":
            # An infinite loss makes each column's gradient infinite, not inf - inf = NaN; 0 where q rounds to 0.
            result = torch.where(q == 0, 0.0, q * torch.where(gap == -torch.inf, torch.inf, -gap - centre))
        else:
            result = q * (terms_and_slopes(p, q, gap, kind, lam)[1] - centre)
        if softcap:
            result = result * (1 - (s / softcap) ** 2)
        factor = scale[part, None].to(result.dtype)
        result = torch.where((factor == 0) | (s == -torch.inf), 0.0, result * (factor / tau_r))
        rows[part] = result.to(out.dtype)
    if flat is not out:
        out.copy_(flat)

"""Definition of `fused_kl_boundary` in plain PyTorch. B rows, T tokens, V shared vocabulary, R = B * T positions.

With p, q the teacher's and the student's distributions at a position, y its token:

    forward_kl = sum_v p log(p / q)      reverse_kl = sum_v q log(q / p)      entropy = - sum_v p log p

where 0 log 0 = 0 and p log(p / 0) = inf. Low-precision logits are read in float32, float64 in float64.
A position is *invalid* where a side's softmax does not exist (NaN or +inf among its logits, or no finite
one): all its numbers are NaN. One whose token is outside the vocabulary has NaN log-probabilities. Neither
has a rank (-1).
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from motab_kernels.boundaries import IS_SAFE, Criterion
from motab_kernels.boundary_state import BoundaryState as S
from motab_kernels.divergence_sums import by_position
from motab_kernels.reference.rows import CHUNK, relative, row_sums
from motab_kernels.tensors import wide_dtype


class Statistics(NamedTuple):
    """Tensors over the positions; the order of the op's first eight outputs."""

    forward_kl: Tensor
    reverse_kl: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    teacher_rank: Tensor
    teacher_argmax: Tensor


def statistics(student: Tensor, teacher: Tensor, token: Tensor, tau: Tensor | None) -> Statistics:
    """Student and teacher (R, V), token and temperature (R,), to (R,) each.

    With x the logits minus their maximum, w = exp(x) and Z = sum w, log p = x - log Z. `log_softmax` is not used,
    because its float32 normaliser is off by 1.5e-5 for V = 151936 on the CPU.
    """
    V = student.shape[1]
    dtype = wide_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    x_s, x_t = relative(student, tau), relative(teacher, tau)
    w_s, w_t = x_s.exp(), x_t.exp()
    z_s, z_t = row_sums(w_s), row_sums(w_t)
    log_z_s, log_z_t = z_s.log(), z_t.log()

    # Where a logit is -inf, 0 * inf must be 0. The host checks first, because a mask takes two more passes.
    excludes = any(bool((x.amin(-1) == -torch.inf).any()) for x in (x_s, x_t))

    def weighted_sum(w: Tensor, x: Tensor) -> Tensor:
        product = w * x
        return row_sums(product.masked_fill_(w == 0, 0) if excludes else product)

    gap, log_z_gap = x_t - x_s, log_z_t - log_z_s
    student_entropy = log_z_s - weighted_sum(w_s, x_s) / z_s
    teacher_entropy = log_z_t - weighted_sum(w_t, x_t) / z_t
    forward_kl = weighted_sum(w_t, gap) / z_t - log_z_gap
    reverse_kl = log_z_gap - weighted_sum(w_s, gap) / z_s
    invalid = z_s.isnan() | z_t.isnan()

    column = token.clamp(0, V - 1)[:, None]
    known = (token >= 0) & (token < V) & ~invalid
    rank = (teacher > teacher.gather(1, column)).sum(-1)

    def where_valid(x: Tensor) -> Tensor:
        return x.masked_fill(invalid, torch.nan)

    def logprob(x: Tensor, log_z: Tensor) -> Tensor:
        return (x.gather(1, column).squeeze(1) - log_z).masked_fill(~known, torch.nan)

    # The KLs are clamped, because of rounding. Entropies and log-probabilities keep their sign: x <= 0 and Z >= 1.
    return Statistics(
        where_valid(forward_kl.clamp_min(0)),
        where_valid(reverse_kl.clamp_min(0)),
        logprob(x_s, log_z_s),
        logprob(x_t, log_z_t),
        where_valid(student_entropy),
        where_valid(teacher_entropy),
        rank.masked_fill(~known, -1).to(torch.int32),
        teacher.argmax(-1).masked_fill(invalid, -1),
    )


def chunked_statistics(student: Tensor, teacher: Tensor, tokens: Tensor, tau: Tensor | None) -> Statistics:
    """`statistics` of (B, T, V) logits, some positions at a time, to (B, T) each."""
    B, T, V = student.shape
    if tau is not None:
        tau = by_position(tau, T).expand(B * T)
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    chunk = max(1, CHUNK // V)
    parts = [
        statistics(
            student[i : i + chunk],
            teacher[i : i + chunk],
            tokens.flatten()[i : i + chunk],
            None if tau is None else tau[i : i + chunk],
        )
        for i in range(0, B * T, chunk)
    ]
    return Statistics(*(torch.cat(column).view(B, T) for column in zip(*parts, strict=True)))


def top_k_entropy(teacher_logits: Tensor, k: int, temperature: Tensor | None) -> Tensor:
    """Entropy of the renormalised `k` largest of (B, ..., V) teacher logits, (B, ...)."""
    top = teacher_logits.topk(min(k, teacher_logits.shape[-1])).values
    top = top.to(wide_dtype(top))
    top = top - top[..., :1]  # before the division, which rounds: large logits would lose their differences
    if temperature is not None:
        top = top / temperature.reshape(-1, *(1,) * (top.dim() - 1)).to(top.dtype)
    log_p = top.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def contributions(stats: Statistics, score: str) -> Tensor:
    """Each token's contribution to its step's score, (B, T) float64; NaN for a token without probability."""
    value = {
        "teacher_value": lambda: stats.teacher_logprob,
        "value_ratio": lambda: stats.teacher_logprob.double() - stats.student_logprob.double(),
        "forward_kl": lambda: stats.forward_kl,
        "reverse_kl": lambda: stats.reverse_kl,
        "teacher_rank": lambda: stats.teacher_rank,
    }[score]()
    return value.double().masked_fill(stats.teacher_logprob.isnan(), torch.nan)


def walk(
    contribution: Tensor,
    entropy: Tensor,
    counted: Tensor,
    ends: Tensor | None,
    criterion: Criterion,
    state: S,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide (B, T) positions in order, and update the state: running score, threshold and stray, (B, T) each.

    The fall of an accepted or breaching step k >= 1 is safety_k - safety_{k-1}, where safety is the score,
    negated if low is safe; -inf for a NaN score, 0 between two equal infinities. Step t* is the one with the
    smallest, the first if there are several.
    """
    # In the order of BoundaryState's columns.
    tokens, step_tokens, steps, fall_start, breach, rollback = (c.clone() for c in state.counters.unbind(1))
    total, score, threshold, safety, fall = (c.clone() for c in state.scores.unbind(1))
    history = state.history.clone()
    scale = torch.as_tensor(criterion.scale, dtype=torch.float64)
    is_safe = IS_SAFE[criterion.score]
    high_is_safe = is_safe is operator.ge
    outputs: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])

    for i in range(contribution.shape[1]):
        live = counted[:, i] & (breach < 0)
        ending = live if ends is None else live & ends[:, i]

        # The threshold of a step is that of its first token.
        if criterion.theta is not None:
            fresh = scale * torch.exp(-torch.as_tensor(criterion.theta, dtype=torch.float64) * entropy[:, i])
        elif criterion.window:
            fresh = torch.where(steps < criterion.window, torch.inf, scale * history.mean(1))
        else:
            fresh = scale
        threshold = torch.where(live & (step_tokens == 0), fresh, threshold)

        tokens, step_tokens = tokens + live.int(), step_tokens + live.int()
        if criterion.score == "teacher_rank":
            total = torch.where(live, torch.maximum(total, contribution[:, i]), total)
            score = torch.where(live, total, score)
        else:
            total = torch.where(live, total + contribution[:, i], total)
            mean = total / step_tokens
            score = torch.where(live, mean.exp() if high_is_safe else mean, score)

        safe = is_safe(score, threshold)
        stray = ending & ~safe

        new_safety = score if high_is_safe else -score
        new_fall = (new_safety - safety).masked_fill_(new_safety == safety, 0)
        new_fall = new_fall.masked_fill_(new_safety.isnan(), -torch.inf)
        falls = ending & (steps > 0) & ((steps == 1) | (new_fall < fall))
        fall = torch.where(falls, new_fall, fall)
        fall_start = torch.where(falls, tokens - step_tokens, fall_start)
        breach = torch.where(stray, tokens, breach)
        rollback = torch.where(stray, fall_start, rollback)

        accepted = ending & safe
        safety = torch.where(accepted, new_safety, safety)
        if criterion.window:
            slot = (steps % criterion.window).long()[:, None]
            history.scatter_(1, slot, torch.where(accepted[:, None], score[:, None], history.gather(1, slot)))
        steps = steps + accepted.int()
        step_tokens = step_tokens.masked_fill(accepted, 0)
        total = total.masked_fill(accepted, 0)

        for output, column in zip(outputs, (score, threshold, stray), strict=True):
            output.append(column.masked_fill(~counted[:, i], 0))

    state.counters.copy_(torch.stack((tokens, step_tokens, steps, fall_start, breach, rollback), 1))
    state.scores.copy_(torch.stack((total, score, threshold, safety, fall), 1))
    state.history.copy_(history)
    return tuple(torch.stack(output, 1) for output in outputs)  # type: ignore[return-value]


def fused_kl_boundary(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    step_ends: Tensor | None,
    temperature: Tensor | None,
    criterion: Criterion,
    state: S,
) -> tuple[Tensor, ...]:
    """The op's outputs, (B, T) each, from (B, T, V) logits of the shared vocabulary; `state` is updated."""
    stats = chunked_statistics(student_logits, teacher_logits, token_ids, temperature)
    doubt = top_k_entropy(teacher_logits, criterion.top_k, temperature) if criterion.top_k else stats.teacher_entropy
    counted = token_ids != -1
    decisions = walk(contributions(stats, criterion.score), doubt.double(), counted, step_ends, criterion, state)
    shown = [x.masked_fill(~counted, 0 if x.is_floating_point() else -1) for x in stats]
    return (*shown, *decisions)

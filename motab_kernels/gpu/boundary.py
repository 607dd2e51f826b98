"""Triton kernels of `fused_kl_boundary`: one pass over the logits, then one program a row that decides.

B rows, T tokens, V shared vocabulary, S splits of it. With t, s the logits at a position, c = log2(e) /
temperature and m_t, m_s the maxima of c t and c s, a split is summed up in

    z_t = sum w_t      a_t = sum w_t x_t      g_t = sum w_t (x_t - x_s)      x_t = c t - m_t      w_t = 2^x_t
    z_s = sum w_s      a_s = sum w_s x_s      g_s = sum w_s (x_t - x_s)      x_s = c s - m_s      w_s = 2^x_s

from which, over log2(e),

    entropy = log2 z - a / z      forward_kl = g_t / z_t - log2(z_t / z_s)      reverse_kl = log2(z_t / z_s) -
    g_s / z_s.

When the maxima move by d_t = m_t - m_t' and d_s,   z' = f z,   a' = f (a + d z),   g' = f (g + (d_t - d_s) z)
with f = 2^d: by this rule lanes take in a tile, splits their lanes, and rows their splits. x is one fused
multiply-add, which rounds once: a constant added to all logits of a side does no harm. m need not be the
maximum to the bit for that.

Low-precision logits are read into float32 and everything is summed in float32; the decision is made in
float64.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from motab_kernels.boundary_state import Rule

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # where maxima start: unlike -inf, less itself it is 0

# Rows of the workspace (positions, 10, S).
TOP_T, Z_T, A_T, G_T, TOP_S, Z_S, A_S, G_S, RANK, ARGMAX = (tl.constexpr(i) for i in range(10))
PARTIALS = tl.constexpr(10)


class Settings(NamedTuple):
    """How the vocabulary is cut. A tile is `lanes` x `per_lane` columns and a split `tiles` tiles."""

    lanes: int = 128  # one a thread
    per_lane: int = 16  # share one rescaling; 128 bits of them are contiguous
    tiles: int = 4
    num_warps: int = 4
    sums: int = 128  # (position, split) pairs that the deciding warp takes in at a time; 256 spill


DEFAULT = Settings()
#: By `torch.cuda.get_device_capability`, or "hip", where a wave has 64 threads.
SETTINGS: dict[tuple[int, int] | str, Settings] = {"hip": Settings(lanes=256, tiles=2)}


@triton.jit
def _moved(f, total, shift, z):
    """A sum of terms w * x after x has grown by `shift`. Nothing is left where f is 0, not even of inf."""
    return tl.where(f != 0, f * (total + shift * z), 0.0)


@triton.jit
def _inverse_temperature(temperature_ptr, HAS_TEMPERATURE: tl.constexpr):
    """c = log2(e) / temperature."""
    temperature = tl.full([], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr).to(tl.float32)
    return LOG2_E / temperature


@triton.jit
def _row_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _row_max(x):
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def _scaled(top, c):
    """A maximum in units of log2, finite: -inf less itself would be NaN."""
    return tl.maximum(top * c, LOWEST)


@triton.jit
def _add_tile(t, s, start, token_logit, c, top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best):
    """Take a (GROUPS, LANES, VECTOR) tile into the lanes' sums. No value crosses a lane."""
    tile_top = _row_max(t)
    best = tl.where(tile_top > top_t, start, best)  # the tile with the lane's first maximum
    new_top_t, new_top_s = tl.maximum(top_t, tile_top), tl.maximum(top_s, _row_max(s))
    m_t, m_s = _scaled(new_top_t, c), _scaled(new_top_s, c)
    d_t, d_s = _scaled(top_t, c) - m_t, _scaled(top_s, c) - m_s
    f_t, f_s = tl.exp2(d_t), tl.exp2(d_s)
    a_t, g_t, z_t = _moved(f_t, a_t, d_t, z_t), _moved(f_t, g_t, d_t - d_s, z_t), z_t * f_t
    a_s, g_s, z_s = _moved(f_s, a_s, d_s, z_s), _moved(f_s, g_s, d_t - d_s, z_s), z_s * f_s

    x_t, x_s = tl.fma(t, c, -m_t[None, :, None]), tl.fma(s, c, -m_s[None, :, None])
    w_t, w_s = tl.exp2(x_t), tl.exp2(x_s)
    gap = x_t - x_s
    # 0 * (-inf) would be NaN; a weight that is NaN is != 0, and stays.
    z_t += _row_sum(w_t)
    a_t += _row_sum(w_t * tl.where(w_t != 0, x_t, 0.0))
    g_t += _row_sum(w_t * tl.where(w_t != 0, gap, 0.0))
    z_s += _row_sum(w_s)
    a_s += _row_sum(w_s * tl.where(w_s != 0, x_s, 0.0))
    g_s += _row_sum(w_s * tl.where(w_s != 0, gap, 0.0))
    rank += _row_sum((t > token_logit).to(tl.float32))  # whole numbers, exact up to 2^24
    return new_top_t, z_t, a_t, g_t, new_top_s, z_s, a_s, g_s, rank, best


@triton.jit
def partial_kernel(
    student_ptr,
    teacher_ptr,
    token_ptr,
    temperature_ptr,
    partial_ptr,
    student_stride_b,
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    token_stride_b,
    token_stride_t,
    temperature_stride_b,
    T,
    V,
    HAS_TEMPERATURE: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sum up split `program_id(1)` of position `program_id(0)`, the axis that may be long."""
    position, split = tl.program_id(0), tl.program_id(1)
    b, i = (position // T).to(tl.int64), (position % T).to(tl.int64)
    token = tl.load(token_ptr + b * token_stride_b + i * token_stride_t)
    if token == -1:
        return  # padding: nobody will look at its sums
    student_ptr += b * student_stride_b + i * student_stride_t
    teacher_ptr += b * teacher_stride_b + i * teacher_stride_t
    known = (token >= 0) & (token < V)
    token_logit = tl.load(teacher_ptr + token, mask=known, other=0.0).to(tl.float32)
    # A constant that bfloat16 lacks: the compiler would else compare in bfloat16, at twice the instructions.
    token_logit = tl.where(known, token_logit, LOWEST)
    c = _inverse_temperature(temperature_ptr + b * temperature_stride_b, HAS_TEMPERATURE)

    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    group, lane, column = tl.arange(0, GROUPS), tl.arange(0, LANES), tl.arange(0, VECTOR)
    columns = group[:, None, None] * (LANES * VECTOR) + lane[None, :, None] * VECTOR + column[None, None, :]
    top_t, top_s = tl.full([LANES], LOWEST, tl.float32), tl.full([LANES], LOWEST, tl.float32)
    zeros = tl.zeros([LANES], tl.float32)
    z_t, a_t, g_t, z_s, a_s, g_s, rank = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    first = split * (TILES * TILE)
    best = tl.zeros([LANES], tl.int32) + first

    end = tl.minimum(first + TILES * TILE, V)
    whole = first + (end - first) // TILE * TILE
    for start in range(first, whole, TILE):
        t = tl.load(teacher_ptr + start + columns).to(tl.float32)
        s = tl.load(student_ptr + start + columns).to(tl.float32)
        top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best = _add_tile(
            t, s, start, token_logit, c, top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best
        )
    if whole < end:  # the tail; what is not there has no probability
        inside = whole + columns < end
        t = tl.load(teacher_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        s = tl.load(student_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best = _add_tile(
            t, s, whole, token_logit, c, top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best
        )

    row_t, row_s = tl.max(top_t, axis=0), tl.max(top_s, axis=0)
    d_t, d_s = _scaled(top_t, c) - _scaled(row_t, c), _scaled(top_s, c) - _scaled(row_s, c)
    f_t, f_s = tl.exp2(d_t), tl.exp2(d_s)

    # The first maximum lies in the earliest of the tiles that have it: look there again, in the lanes that
    # saw it.
    tile = tl.min(tl.where(top_t == row_t, best, V), axis=0)
    columns += tile
    seen = ((top_t == row_t) & (best == tile))[None, :, None] & (columns < end)
    t = tl.load(teacher_ptr + columns, mask=seen, other=-float("inf")).to(tl.float32)
    argmax = tl.min(tl.min(tl.min(tl.where(seen & (t == row_t), columns, V), axis=2), axis=0), axis=0)

    S = tl.num_programs(1)
    partial_ptr += position.to(tl.int64) * PARTIALS * S + split
    tl.store(partial_ptr + TOP_T * S, row_t)
    tl.store(partial_ptr + Z_T * S, tl.sum(z_t * f_t, axis=0))
    tl.store(partial_ptr + A_T * S, tl.sum(_moved(f_t, a_t, d_t, z_t), axis=0))
    tl.store(partial_ptr + G_T * S, tl.sum(_moved(f_t, g_t, d_t - d_s, z_t), axis=0))
    tl.store(partial_ptr + TOP_S * S, row_s)
    tl.store(partial_ptr + Z_S * S, tl.sum(z_s * f_s, axis=0))
    tl.store(partial_ptr + A_S * S, tl.sum(_moved(f_s, a_s, d_s, z_s), axis=0))
    tl.store(partial_ptr + G_S * S, tl.sum(_moved(f_s, g_s, d_t - d_s, z_s), axis=0))
    tl.store(partial_ptr + RANK * S, tl.sum(rank, axis=0))
    tl.store(partial_ptr + ARGMAX * S, (argmax - first).to(tl.float32))  # within the split, exact


@triton.jit
def _pick(x, chosen):
    """The chosen element of a vector, as a scalar."""
    return tl.sum(tl.where(chosen, x, 0.0), axis=0)


@triton.jit
def decide_kernel(
    student_ptr,
    teacher_ptr,
    token_ptr,
    ends_ptr,
    temperature_ptr,
    scale_ptr,
    theta_ptr,
    doubt_ptr,
    partial_ptr,
    counters_ptr,
    scores_ptr,
    history_ptr,
    forward_kl_ptr,
    reverse_kl_ptr,
    student_logprob_ptr,
    teacher_logprob_ptr,
    student_entropy_ptr,
    teacher_entropy_ptr,
    rank_ptr,
    argmax_ptr,
    score_ptr,
    threshold_ptr,
    stray_ptr,
    student_stride_b,
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    token_stride_b,
    token_stride_t,
    ends_stride_b,
    ends_stride_t,
    temperature_stride_b,
    scale_stride_b,
    theta_stride_b,
    T,
    V,
    S,
    SCORE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    HAS_THETA: tl.constexpr,
    HAS_DOUBT: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    S_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
):
    """Combine the splits of row `program_id(0)`, T_BLOCK positions at a time, and walk them in order."""
    LN_2: tl.constexpr = 0.6931471805599453
    b = tl.program_id(0).to(tl.int64)
    c = _inverse_temperature(temperature_ptr + b * temperature_stride_b, HAS_TEMPERATURE)
    scale = tl.load(scale_ptr + b * scale_stride_b).to(tl.float64)
    theta = tl.zeros([], tl.float64)
    if HAS_THETA:
        theta = tl.load(theta_ptr + b * theta_stride_b).to(tl.float64)

    counters_ptr += b * 6  # the columns of BoundaryState, in order
    tokens = tl.load(counters_ptr)
    step_tokens = tl.load(counters_ptr + 1)
    steps = tl.load(counters_ptr + 2)
    fall_start = tl.load(counters_ptr + 3)
    breach = tl.load(counters_ptr + 4)
    rollback = tl.load(counters_ptr + 5)
    scores_ptr += b * 5
    total = tl.load(scores_ptr)
    score = tl.load(scores_ptr + 1)
    threshold = tl.load(scores_ptr + 2)
    safety = tl.load(scores_ptr + 3)
    fall = tl.load(scores_ptr + 4)
    slots = tl.arange(0, WINDOW_BLOCK)
    history_ptr += b * WINDOW + slots
    history = tl.load(history_ptr, mask=slots < WINDOW, other=0.0)

    split = tl.arange(0, S_BLOCK)[None, :]
    for first in range(0, T, T_BLOCK):
        i = first + tl.arange(0, T_BLOCK)
        i_64 = i.to(tl.int64)
        token = tl.load(token_ptr + b * token_stride_b + i_64 * token_stride_t, mask=i < T, other=-1)
        counted = token != -1
        known = (token >= 0) & (token < V)
        position = b * T + i

        # (T_BLOCK, S_BLOCK) partial sums to (T_BLOCK,) statistics. Those of padding were never written.
        there = counted[:, None] & (split < S)
        partials = partial_ptr + position[:, None] * (PARTIALS * S) + split
        top_t = tl.load(partials + TOP_T * S, mask=there, other=LOWEST)
        top_s = tl.load(partials + TOP_S * S, mask=there, other=LOWEST)
        row_t, row_s = tl.max(top_t, axis=1), tl.max(top_s, axis=1)
        m_t, m_s = _scaled(row_t, c), _scaled(row_s, c)
        d_t, d_s = _scaled(top_t, c) - m_t[:, None], _scaled(top_s, c) - m_s[:, None]
        f_t, f_s = tl.exp2(d_t), tl.exp2(d_s)
        part_z_t = tl.load(partials + Z_T * S, mask=there, other=0.0)
        part_z_s = tl.load(partials + Z_S * S, mask=there, other=0.0)
        a_t = tl.load(partials + A_T * S, mask=there, other=0.0)
        a_s = tl.load(partials + A_S * S, mask=there, other=0.0)
        g_t = tl.load(partials + G_T * S, mask=there, other=0.0)
        g_s = tl.load(partials + G_S * S, mask=there, other=0.0)
        z_t, z_s = tl.sum(part_z_t * f_t, axis=1), tl.sum(part_z_s * f_s, axis=1)
        a_t = tl.sum(_moved(f_t, a_t, d_t, part_z_t), axis=1)
        a_s = tl.sum(_moved(f_s, a_s, d_s, part_z_s), axis=1)
        g_t = tl.sum(_moved(f_t, g_t, d_t - d_s, part_z_t), axis=1)
        g_s = tl.sum(_moved(f_s, g_s, d_t - d_s, part_z_s), axis=1)

        # No softmax on a side: NaN or +inf makes z NaN, a lack of finite logits makes it 0.
        nan = float("nan")
        valid = (z_t > 0) & (z_s > 0)
        log_z_t, log_z_s = tl.log2(z_t), tl.log2(z_s)
        forward_kl = LN_2 * (g_t / z_t - (log_z_t - log_z_s))
        reverse_kl = LN_2 * ((log_z_t - log_z_s) - g_s / z_s)
        forward_kl = tl.where(valid, tl.where(forward_kl < 0, 0.0, forward_kl), nan)
        reverse_kl = tl.where(valid, tl.where(reverse_kl < 0, 0.0, reverse_kl), nan)
        teacher_entropy = tl.where(valid, LN_2 * (log_z_t - a_t / z_t), nan)
        student_entropy = tl.where(valid, LN_2 * (log_z_s - a_s / z_s), nan)

        t_offsets = b * teacher_stride_b + i_64 * teacher_stride_t + token
        s_offsets = b * student_stride_b + i_64 * student_stride_t + token
        t = tl.load(teacher_ptr + t_offsets, mask=known, other=0.0).to(tl.float32)
        s = tl.load(student_ptr + s_offsets, mask=known, other=0.0).to(tl.float32)
        teacher_logprob = tl.where(valid & known, LN_2 * (tl.fma(t, c, -m_t) - log_z_t), nan)
        student_logprob = tl.where(valid & known, LN_2 * (tl.fma(s, c, -m_s) - log_z_s), nan)

        rank = tl.sum(tl.load(partials + RANK * S, mask=there, other=0.0), axis=1)
        column = tl.load(partials + ARGMAX * S, mask=there, other=0.0).to(tl.int32) + split * SPLIT
        argmax = tl.min(tl.where(top_t == row_t[:, None], column, V), axis=1)

        inside = i < T
        tl.store(forward_kl_ptr + position, tl.where(counted, forward_kl, 0.0), mask=inside)
        tl.store(reverse_kl_ptr + position, tl.where(counted, reverse_kl, 0.0), mask=inside)
        tl.store(student_logprob_ptr + position, tl.where(counted, student_logprob, 0.0), mask=inside)
        tl.store(teacher_logprob_ptr + position, tl.where(counted, teacher_logprob, 0.0), mask=inside)
        tl.store(student_entropy_ptr + position, tl.where(counted, student_entropy, 0.0), mask=inside)
        tl.store(teacher_entropy_ptr + position, tl.where(counted, teacher_entropy, 0.0), mask=inside)
        tl.store(rank_ptr + position, tl.where(valid & known, rank.to(tl.int32), -1), mask=inside)
        tl.store(argmax_ptr + position, tl.where(valid & counted, argmax.to(tl.int64), -1), mask=inside)

        # What each token brings to its step's score; NaN for a token without probability.
        if SCORE == "teacher_value":
            bring = teacher_logprob.to(tl.float64)
        elif SCORE == "value_ratio":
            bring = teacher_logprob.to(tl.float64) - student_logprob.to(tl.float64)
        elif SCORE == "forward_kl":
            bring = forward_kl.to(tl.float64)
        elif SCORE == "reverse_kl":
            bring = reverse_kl.to(tl.float64)
        else:
            bring = rank.to(tl.float64)
        bring = tl.where(teacher_logprob == teacher_logprob, bring, nan)
        doubt = teacher_entropy.to(tl.float64)
        if HAS_DOUBT:
            doubt = tl.load(doubt_ptr + position, mask=inside, other=0.0).to(tl.float64)
        ends = counted
        if HAS_ENDS:
            ends_offsets = b * ends_stride_b + i_64 * ends_stride_t
            ends = counted & (tl.load(ends_ptr + ends_offsets, mask=inside, other=0) != 0)

        # From here on scalars, as in the reference's `walk`.
        for j in range(first, tl.minimum(first + T_BLOCK, T)):
            here = i == j
            counts = tl.sum((here & counted).to(tl.int32), axis=0) > 0
            live = counts & (breach < 0)
            ending = live & (tl.sum((here & ends).to(tl.int32), axis=0) > 0)
            brought = _pick(bring, here)

            fresh = scale
            if HAS_THETA:
                fresh = scale * tl.exp(-theta * _pick(doubt, here))
            if WINDOW > 0:
                fresh = tl.where(steps < WINDOW, float("inf"), scale * (tl.sum(history, axis=0) / WINDOW))
            threshold = tl.where(live & (step_tokens == 0), fresh, threshold)

            tokens += live.to(tl.int32)
            step_tokens += live.to(tl.int32)
            if SCORE == "teacher_rank":
                # Compared so, unlike with a maximum, NaN takes over and stays.
                total = tl.where(live & ~(brought <= total) & (total == total), brought, total)
                new_score = total
            else:
                total = tl.where(live, total + brought, total)
                new_score = total / tl.maximum(step_tokens, 1).to(tl.float64)
            if SCORE == "teacher_value" or SCORE == "value_ratio":
                new_score = tl.exp(new_score)
            score = tl.where(live, new_score, score)

            if SCORE == "teacher_value" or SCORE == "value_ratio":
                safe = score >= threshold
                new_safety = score
            elif SCORE == "teacher_rank":
                safe = score < threshold
                new_safety = -score
            else:
                safe = score <= threshold
                new_safety = -score
            stray = ending & ~safe

            new_fall = tl.where(new_safety == safety, 0.0, new_safety - safety)
            new_fall = tl.where(new_safety == new_safety, new_fall, -float("inf"))
            falls = ending & (steps > 0) & ((steps == 1) | (new_fall < fall))
            fall = tl.where(falls, new_fall, fall)
            fall_start = tl.where(falls, tokens - step_tokens, fall_start)
            breach = tl.where(stray, tokens, breach)
            rollback = tl.where(stray, fall_start, rollback)

            accepted = ending & safe
            safety = tl.where(accepted, new_safety, safety)
            if WINDOW > 0:
                history = tl.where(accepted & (slots == steps % WINDOW), score, history)
            steps += accepted.to(tl.int32)
            step_tokens = tl.where(accepted, 0, step_tokens)
            total = tl.where(accepted, 0.0, total)

            tl.store(score_ptr + b * T + j, tl.where(counts, score, 0.0).to(tl.float32))
            tl.store(threshold_ptr + b * T + j, tl.where(counts, threshold, 0.0).to(tl.float32))
            tl.store(stray_ptr + b * T + j, stray)

    tl.store(counters_ptr, tokens)
    tl.store(counters_ptr + 1, step_tokens)
    tl.store(counters_ptr + 2, steps)
    tl.store(counters_ptr + 3, fall_start)
    tl.store(counters_ptr + 4, breach)
    tl.store(counters_ptr + 5, rollback)
    tl.store(scores_ptr, total)
    tl.store(scores_ptr + 1, score)
    tl.store(scores_ptr + 2, threshold)
    tl.store(scores_ptr + 3, safety)
    tl.store(scores_ptr + 4, fall)
    tl.store(history_ptr, history, mask=slots < WINDOW)


# : The kernels run on CPU tensors, in Triton's interpreter: TRITON_INTERPRET=1 was set when triton was
# imported.
INTERPRETED = not isinstance(partial_kernel, triton.JITFunction)


def settings_for(device: torch.device) -> Settings:
    if device.type != "cuda":
        return DEFAULT
    key = "hip" if torch.version.hip else torch.cuda.get_device_capability(device)
    return SETTINGS.get(key, DEFAULT)


def workspace_shape(positions: int, V: int, settings: Settings) -> tuple[int, int, int]:
    """(positions, sums, splits) float32. The splits follow from V alone, so that a row's sums do not change
    with its batch."""
    return positions, PARTIALS.value, triton.cdiv(V, settings.lanes * settings.per_lane * settings.tiles)


def fused_kl_boundary(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    step_ends: Tensor | None,
    temperature: Tensor | None,
    doubt: Tensor | None,
    rule: Rule,
    state: tuple[Tensor, Tensor, Tensor],
    out: list[Tensor],
    workspace: Tensor,
    settings: Settings,
) -> None:
    """Write `out`, (B, T) contiguous each, from (B, T, V) logits contiguous in V; update `state`'s tensors.

    `doubt` (B, T) contiguous, if given, stands for the teacher's entropy in the threshold.
    """
    B, T, V = student_logits.shape
    S = workspace_shape(B * T, V, settings)[2]
    S_BLOCK = triton.next_power_of_2(S)
    vector = 16 // max(student_logits.element_size(), teacher_logits.element_size())  # 128 bits
    strides = {
        "student_stride_b": student_logits.stride(0),
        "student_stride_t": student_logits.stride(1),
        "teacher_stride_b": teacher_logits.stride(0),
        "teacher_stride_t": teacher_logits.stride(1),
        "token_stride_b": token_ids.stride(0),
        "token_stride_t": token_ids.stride(1),
        "temperature_stride_b": row_stride(temperature),
    }
    logits = {"student_ptr": student_logits, "teacher_ptr": teacher_logits, "token_ptr": token_ids}
    # An absent tensor's pointer is never read; any other stands in for it.
    absent = token_ids
    given = {"temperature_ptr": absent if temperature is None else temperature, "partial_ptr": workspace}
    with torch.cuda.device(student_logits.device) if student_logits.is_cuda else contextlib.nullcontext():
        partial_kernel[(B * T, S)](
            **logits,
            **given,
            **strides,
            T=T,
            V=V,
            HAS_TEMPERATURE=temperature is not None,
            GROUPS=settings.per_lane // vector,
            LANES=settings.lanes,
            VECTOR=vector,
            TILES=settings.tiles,
            num_warps=settings.num_warps,
        )
        decide_kernel[(B,)](
            **logits,
            **given,
            **strides,
            ends_ptr=absent if step_ends is None else step_ends,
            scale_ptr=rule.scale,
            theta_ptr=absent if rule.theta is None else rule.theta,
            doubt_ptr=absent if doubt is None else doubt,
            counters_ptr=state[0],
            scores_ptr=state[1],
            history_ptr=state[2],
            **dict(zip(OUTPUT_POINTERS, out, strict=True)),
            ends_stride_b=0 if step_ends is None else step_ends.stride(0),
            ends_stride_t=0 if step_ends is None else step_ends.stride(1),
            scale_stride_b=row_stride(rule.scale),
            theta_stride_b=row_stride(rule.theta),
            T=T,
            V=V,
            S=S,
            SCORE=rule.score,
            HAS_TEMPERATURE=temperature is not None,
            HAS_ENDS=step_ends is not None,
            HAS_THETA=rule.theta is not None,
            HAS_DOUBT=doubt is not None,
            WINDOW=rule.window,
            WINDOW_BLOCK=triton.next_power_of_2(max(1, rule.window)),
            SPLIT=settings.lanes * settings.per_lane * settings.tiles,
            S_BLOCK=S_BLOCK,
            T_BLOCK=min(triton.next_power_of_2(T), max(1, settings.sums // S_BLOCK)),
            num_warps=1,
        )


def row_stride(parameter: Tensor | float | None) -> int:
    """0 for a parameter that all rows share."""
    return parameter.stride(0) if isinstance(parameter, Tensor) and parameter.dim() else 0


OUTPUT_POINTERS = (
    "forward_kl_ptr",
    "reverse_kl_ptr",
    "student_logprob_ptr",
    "teacher_logprob_ptr",
    "student_entropy_ptr",
    "teacher_entropy_ptr",
    "rank_ptr",
    "argmax_ptr",
    "score_ptr",
    "threshold_ptr",
    "stray_ptr",
)

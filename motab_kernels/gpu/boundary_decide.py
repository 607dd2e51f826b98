"""Second kernel of `fused_kl_boundary`: combine a row's splits, walk its tokens in order, update its state.

B rows, T tokens, V shared vocabulary, S splits of it. The sums, and how they are combined, are in `boundary_partial`.
Statistics are float32, the decision is made in float64.
"""

import triton
import triton.language as tl

from motab_kernels.gpu.boundary_partial import row, rows
from motab_kernels.gpu.online_softmax import inverse_temperature, ln_2, lowest, moved, scaled


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
    b = tl.program_id(0).to(tl.int64)
    c = inverse_temperature(temperature_ptr + b * temperature_stride_b, HAS_TEMPERATURE)
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

        # (T_BLOCK, S_BLOCK) partial sums to (T_BLOCK,) statistics. The sums of padding were never written.
        there = counted[:, None] & (split < S)
        partials = partial_ptr + position[:, None] * (rows() * S) + split
        top_t = tl.load(partials + row("top_t") * S, mask=there, other=lowest())
        top_s = tl.load(partials + row("top_s") * S, mask=there, other=lowest())
        row_t, row_s = tl.max(top_t, axis=1), tl.max(top_s, axis=1)
        m_t, m_s = scaled(row_t, c), scaled(row_s, c)
        d_t, d_s = scaled(top_t, c) - m_t[:, None], scaled(top_s, c) - m_s[:, None]
        f_t, f_s = tl.exp2(d_t), tl.exp2(d_s)
        part_z_t = tl.load(partials + row("z_t") * S, mask=there, other=0.0)
        part_z_s = tl.load(partials + row("z_s") * S, mask=there, other=0.0)
        a_t = tl.load(partials + row("a_t") * S, mask=there, other=0.0)
        a_s = tl.load(partials + row("a_s") * S, mask=there, other=0.0)
        g_t = tl.load(partials + row("g_t") * S, mask=there, other=0.0)
        g_s = tl.load(partials + row("g_s") * S, mask=there, other=0.0)
        z_t, z_s = tl.sum(part_z_t * f_t, axis=1), tl.sum(part_z_s * f_s, axis=1)
        a_t = tl.sum(moved(f_t, a_t, d_t, part_z_t), axis=1)
        a_s = tl.sum(moved(f_s, a_s, d_s, part_z_s), axis=1)
        g_t = tl.sum(moved(f_t, g_t, d_t - d_s, part_z_t), axis=1)
        g_s = tl.sum(moved(f_s, g_s, d_t - d_s, part_z_s), axis=1)

        # A side without a softmax: NaN or +inf makes z NaN, no finite logit makes it 0.
        nan = float("nan")
        valid = (z_t > 0) & (z_s > 0)
        log_z_t, log_z_s = tl.log2(z_t), tl.log2(z_s)
        forward_kl = (g_t / z_t - (log_z_t - log_z_s)) * ln_2()
        reverse_kl = ((log_z_t - log_z_s) - g_s / z_s) * ln_2()
        forward_kl = tl.where(valid, tl.where(forward_kl < 0, 0.0, forward_kl), nan)
        reverse_kl = tl.where(valid, tl.where(reverse_kl < 0, 0.0, reverse_kl), nan)
        teacher_entropy, student_entropy = (log_z_t - a_t / z_t) * ln_2(), (log_z_s - a_s / z_s) * ln_2()
        teacher_entropy = tl.where(valid, tl.where(teacher_entropy < 0, 0.0, teacher_entropy), nan)
        student_entropy = tl.where(valid, tl.where(student_entropy < 0, 0.0, student_entropy), nan)

        t_offsets = b * teacher_stride_b + i_64 * teacher_stride_t + token
        s_offsets = b * student_stride_b + i_64 * student_stride_t + token
        t = tl.load(teacher_ptr + t_offsets, mask=known, other=0.0).to(tl.float32)
        s = tl.load(student_ptr + s_offsets, mask=known, other=0.0).to(tl.float32)
        teacher_logprob, student_logprob = tl.fma(t, c, -m_t) - log_z_t, tl.fma(s, c, -m_s) - log_z_s
        teacher_logprob = tl.where(valid & known, tl.where(teacher_logprob > 0, 0.0, teacher_logprob) * ln_2(), nan)
        student_logprob = tl.where(valid & known, tl.where(student_logprob > 0, 0.0, student_logprob) * ln_2(), nan)

        rank = tl.sum(tl.load(partials + row("rank") * S, mask=there, other=0.0), axis=1)
        column = tl.load(partials + row("argmax") * S, mask=there, other=0.0).to(tl.int32) + split * SPLIT
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

        # Each token's contribution to its step's score; NaN for a token without probability.
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
        if HAS_THETA:
            # Thresholds of steps that begin here: a warp takes as long for one as for 32.
            bounds = scale * tl.exp(-theta * doubt)
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
                fresh = _pick(bounds, here)
            if WINDOW > 0:
                fresh = tl.where(steps < WINDOW, float("inf"), scale * (tl.sum(history, axis=0) / WINDOW))
            threshold = tl.where(live & (step_tokens == 0), fresh, threshold)

            tokens += live.to(tl.int32)
            step_tokens += live.to(tl.int32)
            if SCORE == "teacher_rank":
                # Unlike a maximum, this comparison lets a NaN take over and stay.
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

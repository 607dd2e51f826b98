"""Last kernel of `fused_kl_boundary`: walk a row's tokens in order, update its state.

B rows, T tokens, V shared vocabulary, S splits of it. Statistics are float32, the decision is made in float64.
"""

import triton
import triton.language as tl

from motab_kernels.gpu.boundary_combine import combined
from motab_kernels.gpu.online_softmax import inverse_temperature


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
    COMBINE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    S_BLOCK: tl.constexpr,
):
    """Walk the tokens of row `program_id(0)`, BLOCK of them at a time; COMBINE: their statistics are not there yet."""
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

    student = (student_ptr, student_stride_b, student_stride_t)
    teacher = (teacher_ptr, teacher_stride_b, teacher_stride_t)
    out = (
        forward_kl_ptr,
        reverse_kl_ptr,
        student_logprob_ptr,
        teacher_logprob_ptr,
        student_entropy_ptr,
        teacher_entropy_ptr,
        rank_ptr,
        argmax_ptr,
    )
    for first in range(0, T, BLOCK):
        i = first + tl.arange(0, BLOCK)
        i_64 = i.to(tl.int64)
        token = tl.load(token_ptr + b * token_stride_b + i_64 * token_stride_t, mask=i < T, other=-1)
        counted = token != -1
        position = b * T + i
        inside = i < T
        if COMBINE:
            forward_kl, reverse_kl, student_logprob, teacher_logprob, teacher_entropy, rank = combined(
                b, i, token, c, student, teacher, partial_ptr, out, T, V, S, SPLIT, S_BLOCK
            )
        else:
            forward_kl = tl.load(forward_kl_ptr + position, mask=inside, other=0.0)
            reverse_kl = tl.load(reverse_kl_ptr + position, mask=inside, other=0.0)
            student_logprob = tl.load(student_logprob_ptr + position, mask=inside, other=0.0)
            teacher_logprob = tl.load(teacher_logprob_ptr + position, mask=inside, other=0.0)
            teacher_entropy = tl.load(teacher_entropy_ptr + position, mask=inside, other=0.0)
            rank = tl.load(rank_ptr + position, mask=inside, other=0)

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
        bring = tl.where(teacher_logprob == teacher_logprob, bring, float("nan"))
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
        for j in range(first, tl.minimum(first + BLOCK, T)):
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

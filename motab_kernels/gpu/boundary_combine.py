"""Second kernel of `fused_kl_boundary`: a position's splits combined, to the statistics of its token.

B rows, T tokens, V shared vocabulary, S splits of it. The sums, and how they are combined, are in `boundary_partial`.
"""

import triton
import triton.language as tl

from motab_kernels.gpu.boundary_partial import row, rows
from motab_kernels.gpu.online_softmax import inverse_temperature, ln_2, lowest, moved, scaled


@triton.jit
def combined(b, i, token, c, student, teacher, partial_ptr, out, T, V, S, SPLIT: tl.constexpr, S_BLOCK: tl.constexpr):
    """Write to `out`, eight pointers, the statistics of the (T_BLOCK,) `token`s at places `i` of row `b`; return those
    that a score may need. `student`, `teacher`: the logits' pointer and strides by row and place."""
    student_ptr, student_stride_b, student_stride_t = student
    teacher_ptr, teacher_stride_b, teacher_stride_t = teacher
    forward_kl_ptr, reverse_kl_ptr, student_logprob_ptr, teacher_logprob_ptr = out[:4]
    student_entropy_ptr, teacher_entropy_ptr, rank_ptr, argmax_ptr = out[4:]
    counted = token != -1
    known = (token >= 0) & (token < V)
    i_64 = i.to(tl.int64)
    position = b * T + i
    split = tl.arange(0, S_BLOCK)[None, :]

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
    return forward_kl, reverse_kl, student_logprob, teacher_logprob, teacher_entropy, rank


@triton.jit
def combine_kernel(
    student_ptr,
    teacher_ptr,
    token_ptr,
    temperature_ptr,
    partial_ptr,
    forward_kl_ptr,
    reverse_kl_ptr,
    student_logprob_ptr,
    teacher_logprob_ptr,
    student_entropy_ptr,
    teacher_entropy_ptr,
    rank_ptr,
    argmax_ptr,
    student_stride_b,
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    token_stride_b,
    token_stride_t,
    temperature_stride_b,
    T,
    V,
    S,
    HAS_TEMPERATURE: tl.constexpr,
    SPLIT: tl.constexpr,
    S_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
):
    """`combined` for block `program_id(0)` of T_BLOCK places, the rows' one after another."""
    blocks = tl.cdiv(T, T_BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * T_BLOCK + tl.arange(0, T_BLOCK)
    token = tl.load(token_ptr + b * token_stride_b + i.to(tl.int64) * token_stride_t, mask=i < T, other=-1)
    c = inverse_temperature(temperature_ptr + b * temperature_stride_b, HAS_TEMPERATURE)
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
    combined(b, i, token, c, student, teacher, partial_ptr, out, T, V, S, SPLIT, S_BLOCK)

"""Kernels of `divergence_loss` that read the logits with the row's normalisers at hand: terms and gradient.

B rows, T tokens, V shared vocabulary, S splits of it. With gap = log2(p / q), w the larger of p and q and
e = 2^-|gap|, the two are w and w e, and m = lam p + (1 - lam) q is w u with u = 1 - share (1 - e), where `share` is
the smaller one's in the mixture. So log2(p / m) and log2(q / m) are exact to rounding also where p and q nearly
agree, nothing overflows, and three special functions do for both. The formulas are in `reference/divergence`.
"""

import triton
import triton.language as tl

from motab_kernels.gpu.online_softmax import LN_2, LOG2_E, inverse_temperature, scaled, tile_sum


@triton.jit
def _row(saved_ptr, c):
    """A row's m_t - log2(1 / z_t), the same of the student, and what is taken off c (t - s) to make the gap."""
    m_t, m_s = scaled(tl.load(saved_ptr), c), scaled(tl.load(saved_ptr + 1), c)
    reciprocal_t, reciprocal_s = tl.load(saved_ptr + 2), tl.load(saved_ptr + 3)
    return m_t, m_s, reciprocal_t, reciprocal_s, (m_t - m_s) + tl.load(saved_ptr + 4) * LOG2_E


@triton.jit
def _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset):
    """w, e, gap and whether p is the larger; w is 0 where neither has probability, and the gap finite."""
    gap = c * tl.where(t == s, 0.0, t - s) - offset
    p_leads = gap > 0
    x = tl.where(p_leads, tl.fma(t, c, -m_t), tl.fma(s, c, -m_s))
    w = tl.exp2(x) * tl.where(p_leads, reciprocal_t, reciprocal_s)
    return w, tl.exp2(-tl.abs(gap)), gap, p_leads


@triton.jit
def _slope(e, gap, p_leads, lam, KIND: tl.constexpr):
    """g, up to a constant, and log2(p / m), log2(q / m) where the kind has a mixture m."""
    if KIND == "tvd":
        slope = tl.where(p_leads, -0.5, tl.where(gap < 0, 0.5, gap))  # 0 at a tie, and NaN stays
        return slope, slope, slope
    share = tl.where(p_leads, 1 - lam, lam)
    apart = 1 - e
    u = 1 - share * apart
    log_u = tl.log2(u)
    # A probability that far below the other is nothing, and 0 * inf would be NaN.
    down = -tl.minimum(tl.abs(gap), 200.0)
    log_p_m = tl.where(p_leads, 0.0, down) - log_u
    log_q_m = tl.where(p_leads, down, 0.0) - log_u
    if KIND == "jsd":
        slope = (1 - lam) * (log_q_m * LN_2)
    elif KIND == "skew_forward_kl":
        slope = -(1 - lam) * (tl.where(p_leads, share, share - 1) * apart / u)
    else:
        slope = log_q_m * LN_2 - (1 - lam) * (tl.where(p_leads, share - 1, share) * apart / u)
    return slope, log_p_m, log_q_m


@triton.jit
def _terms(w, e, gap, p_leads, lam, KIND: tl.constexpr):
    """What each column adds to the divergence, and to sum q g."""
    slope, log_p_m, log_q_m = _slope(e, gap, p_leads, lam, KIND)
    lesser = w * e
    p, q = tl.where(p_leads, w, lesser), tl.where(p_leads, lesser, w)
    if KIND == "tvd":
        term = 0.5 * w * (1 - e)
    elif KIND == "jsd":
        term = (lam * p * log_p_m + (1 - lam) * q * log_q_m) * LN_2
    elif KIND == "skew_forward_kl":
        term = p * (log_p_m * LN_2) + (1 - lam) * (q - p)
    else:
        term = q * (log_q_m * LN_2) + lam * (p - q)
    return term, q * slope


@triton.jit
def terms_kernel(
    student_ptr,
    teacher_ptr,
    keep_ptr,
    temperature_ptr,
    saved_ptr,
    terms_ptr,
    student_stride_b,
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    temperature_stride_b,
    T,
    V,
    lam,
    KIND: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
):
    """The divergence and sum q g over split `program_id(1)` of position `program_id(0)`, to (R, 2, S)."""
    position, split, S = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    terms_ptr += position * 2 * S + split
    if HAS_KEEP:
        if tl.load(keep_ptr + position) == 0:
            tl.store(terms_ptr, 0.0)
            tl.store(terms_ptr + S, 0.0)
            return
    b, i = position // T, position % T
    student_ptr += b * student_stride_b + i * student_stride_t
    teacher_ptr += b * teacher_stride_b + i * teacher_stride_t
    c = inverse_temperature(temperature_ptr + b * temperature_stride_b, HAS_TEMPERATURE)
    m_t, m_s, reciprocal_t, reciprocal_s, offset = _row(saved_ptr + position * 6, c)

    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    group, lane, column = tl.arange(0, GROUPS), tl.arange(0, LANES), tl.arange(0, VECTOR)
    columns = group[:, None, None] * (LANES * VECTOR) + lane[None, :, None] * VECTOR + column[None, None, :]
    divergence, centre = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    first = split * (TILES * TILE)
    end = tl.minimum(first + TILES * TILE, V)
    whole = first + (end - first) // TILE * TILE
    for start in range(first, whole, TILE):
        t = tl.load(teacher_ptr + start + columns).to(tl.float32)
        s = tl.load(student_ptr + start + columns).to(tl.float32)
        w, e, gap, p_leads = _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset)
        term, weighted = _terms(w, e, gap, p_leads, lam, KIND)
        divergence += tile_sum(term)
        centre += tile_sum(weighted)
    if whole < end:  # the tail; what is not there has no probability
        inside = whole + columns < end
        t = tl.load(teacher_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        s = tl.load(student_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        w, e, gap, p_leads = _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset)
        term, weighted = _terms(w, e, gap, p_leads, lam, KIND)
        divergence += tile_sum(term)
        centre += tile_sum(weighted)
    tl.store(terms_ptr, tl.sum(divergence, axis=0))
    tl.store(terms_ptr + S, tl.sum(centre, axis=0))


@triton.jit
def _gradient(t, s, c, factor, centre, lam, m_t, m_s, reciprocal_t, reciprocal_s, offset, KIND: tl.constexpr):
    w, e, gap, p_leads = _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset)
    q = tl.where(p_leads, w * e, w)
    if KIND == "forward_kl":
        rest = w * (1 - e)
        result = tl.where(p_leads, -rest, rest)
    elif KIND == "reverse_kl":
        # Of an infinite loss each column pulls infinitely, and none as inf - inf.
        result = q * tl.where(gap == -float("inf"), float("inf"), gap * -LN_2 - centre)
    else:
        slope, _, _ = _slope(e, gap, p_leads, lam, KIND)
        result = q * (slope - centre)
    return tl.where(s == -float("inf"), 0.0, result * factor)


@triton.jit
def gradient_kernel(
    student_ptr,
    teacher_ptr,
    temperature_ptr,
    saved_ptr,
    scale_ptr,
    out_ptr,
    student_stride_b,
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    out_stride_b,
    out_stride_t,
    temperature_stride_b,
    T,
    V,
    lam,
    KIND: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
):
    """The gradient of split `program_id(1)` of position `program_id(0)`; each logit is read before it is written."""
    position, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, i = position // T, position % T
    student_ptr += b * student_stride_b + i * student_stride_t
    teacher_ptr += b * teacher_stride_b + i * teacher_stride_t
    out_ptr += b * out_stride_b + i * out_stride_t
    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    group, lane, column = tl.arange(0, GROUPS), tl.arange(0, LANES), tl.arange(0, VECTOR)
    columns = group[:, None, None] * (LANES * VECTOR) + lane[None, :, None] * VECTOR + column[None, None, :]
    first = split * (TILES * TILE)
    end = tl.minimum(first + TILES * TILE, V)
    whole = first + (end - first) // TILE * TILE

    scale = tl.load(scale_ptr + position).to(tl.float32)
    if scale == 0:  # whatever the logits
        zeros = tl.zeros([GROUPS, LANES, VECTOR], out_ptr.dtype.element_ty)
        for start in range(first, whole, TILE):
            tl.store(out_ptr + start + columns, zeros)
        if whole < end:
            tl.store(out_ptr + whole + columns, zeros, mask=whole + columns < end)
        return

    c = inverse_temperature(temperature_ptr + b * temperature_stride_b, HAS_TEMPERATURE)
    factor = scale * (c * LN_2)
    saved_ptr += position * 6
    m_t, m_s, reciprocal_t, reciprocal_s, offset = _row(saved_ptr, c)
    centre = tl.load(saved_ptr + 5)
    for start in range(first, whole, TILE):
        t = tl.load(teacher_ptr + start + columns).to(tl.float32)
        s = tl.load(student_ptr + start + columns).to(tl.float32)
        result = _gradient(t, s, c, factor, centre, lam, m_t, m_s, reciprocal_t, reciprocal_s, offset, KIND)
        tl.store(out_ptr + start + columns, result.to(out_ptr.dtype.element_ty))
    if whole < end:
        inside = whole + columns < end
        t = tl.load(teacher_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        s = tl.load(student_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        result = _gradient(t, s, c, factor, centre, lam, m_t, m_s, reciprocal_t, reciprocal_s, offset, KIND)
        tl.store(out_ptr + whole + columns, result.to(out_ptr.dtype.element_ty), mask=inside)

"""Kernels of `divergence_loss` that read the logits with the row's normalisers at hand: terms and gradient.

B rows, T tokens, V shared vocabulary, S splits of it. With gap = log2(p / q), w the larger of p and q and
e = 2^-|gap|, the two are w and w e, and m = lam p + (1 - lam) q is w u with u = 1 - share (1 - e), where `share` is
the smaller one's in the mixture. So log2(p / m) and log2(q / m) are exact to rounding also where p and q nearly
agree, nothing overflows, and two or three special functions do for both. The formulas are in `reference/divergence`.
"""

import triton
import triton.language as tl

from motab_kernels.gpu.online_softmax import LN_2, LOG2_E, inverse_temperature, scaled, tile_columns, tile_sum


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
def _minus_log2(x, EVEN: tl.constexpr):
    """-log2(1 - x) for 0 <= x < 1, also near 0 within 2e-7 of itself where multiply-adds are fused.

    For y <= 1/2 it is y times a polynomial, minimax in relative error (Remez, 2e-8 before rounding), 9 instructions.
    Beyond, 1 - x is 2^-n (1 - y) by the exponent of the float below it, so that 1 itself has n = 0 and y = x: 8 more.
    tl.log2 takes 35.
    """
    y = x
    if not EVEN:
        exponent = ((1 - x).to(tl.int32, bitcast=True) - 1) & 0x7F800000
        scale = (0x7E800000 - exponent).to(tl.float32, bitcast=True)
        y = tl.fma(x, scale, 1 - scale)
    r = y * 2.0790793895721436 - 2.4466395404266357
    r = r * y + 1.8144340515136719
    r = r * y - 0.2936446964740753
    r = r * y + 0.3889690041542053
    r = r * y + 0.35029366612434387
    r = r * y + 0.48142823576927185
    r = r * y + 0.7213371992111206
    r = r * y + 1.4426950216293335
    r *= y
    if not EVEN:
        r += 126 - exponent.to(tl.float32) * (1 / 8388608)  # n
    return r


@triton.jit
def _mixture(e, gap, p_leads, lam, EVEN: tl.constexpr):
    """(p - q) / w, u = m / w, log2(1 / u), log2(p / m) and log2(q / m)."""
    apart = 1 - e
    share = lam
    if not EVEN:
        share = tl.where(p_leads, 1 - lam, lam)
    x = share * apart
    log_w_m = _minus_log2(x, EVEN)
    # A probability that far below the other is nothing, and 0 * inf would be NaN.
    down = log_w_m - tl.minimum(tl.abs(gap), 200.0)
    log_p_m, log_q_m = tl.where(p_leads, log_w_m, down), tl.where(p_leads, down, log_w_m)
    return tl.where(p_leads, apart, -apart), 1 - x, log_w_m, log_p_m, log_q_m


@triton.jit
def _slope(e, gap, p_leads, lam, KIND: tl.constexpr, EVEN: tl.constexpr):
    """g, up to a constant: with p / m - 1 = (1 - lam) (p - q) / m and q / m - 1 = -lam (p - q) / m, for those keep what
    p / m and q / m would lose."""
    if KIND == "tvd":
        return tl.where(p_leads, -0.5, tl.where(gap < 0, 0.5, gap))  # 0 at a tie, and NaN stays
    signed, u, log_w_m, _, log_q_m = _mixture(e, gap, p_leads, lam, EVEN)
    if KIND == "jsd":
        return (1 - lam) * LN_2 * log_q_m
    if KIND == "skew_forward_kl":
        return (1 - lam) * (lam - 1) * (signed / u)  # which needs no logarithm
    return LN_2 * log_q_m + (1 - lam) * lam * (signed * tl.exp2(log_w_m))


@triton.jit
def _terms(w, e, gap, p_leads, lam, KIND: tl.constexpr, EVEN: tl.constexpr):
    """What each column adds to the divergence, and to sum q g, in units of `_units`."""
    p, q = tl.where(p_leads, 1.0, e), tl.where(p_leads, e, 1.0)  # over w
    if KIND == "tvd":
        return w * (1 - e), w * (q * _slope(e, gap, p_leads, lam, KIND, EVEN))
    signed, _, log_w_m, log_p_m, log_q_m = _mixture(e, gap, p_leads, lam, EVEN)
    q_log = q * log_q_m
    if KIND == "jsd":
        return w * (lam * (p * log_p_m) + (1 - lam) * q_log), w * q_log
    pull = q * (signed * tl.exp2(log_w_m))  # an exponential takes fewer instructions than a division by u
    if KIND == "skew_forward_kl":
        return w * (p * log_p_m - (1 - lam) * LOG2_E * signed), w * pull
    return w * (q_log + lam * LOG2_E * signed), w * (q_log + (1 - lam) * lam * LOG2_E * pull)


@triton.jit
def _units(lam, KIND: tl.constexpr):
    """What the sums of `_terms` are multiplied by, once."""
    if KIND == "tvd":
        return 0.5, 1.0
    if KIND == "jsd":
        return LN_2, (1 - lam) * LN_2
    if KIND == "skew_forward_kl":
        return LN_2, (1 - lam) * (lam - 1)
    return LN_2, LN_2


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
    EVEN: tl.constexpr,  # lam is 1/2
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
    columns = tile_columns(GROUPS, LANES, VECTOR)
    divergence, centre = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    first = split * (TILES * TILE)
    end = tl.minimum(first + TILES * TILE, V)
    whole = first + (end - first) // TILE * TILE
    for start in range(first, whole, TILE):
        t = tl.load(teacher_ptr + start + columns).to(tl.float32)
        s = tl.load(student_ptr + start + columns).to(tl.float32)
        w, e, gap, p_leads = _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset)
        term, weighted = _terms(w, e, gap, p_leads, lam, KIND, EVEN)
        divergence += tile_sum(term)
        centre += tile_sum(weighted)
    if whole < end:  # the tail; what is not there has no probability
        inside = whole + columns < end
        t = tl.load(teacher_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        s = tl.load(student_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        w, e, gap, p_leads = _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset)
        term, weighted = _terms(w, e, gap, p_leads, lam, KIND, EVEN)
        divergence += tile_sum(term)
        centre += tile_sum(weighted)
    unit, weighted_unit = _units(lam, KIND)
    tl.store(terms_ptr, tl.sum(divergence, axis=0) * unit)
    tl.store(terms_ptr + S, tl.sum(centre, axis=0) * weighted_unit)


@triton.jit
def _gradient(
    t, s, c, factor, centre, lam, m_t, m_s, reciprocal_t, reciprocal_s, offset, KIND: tl.constexpr, EVEN: tl.constexpr
):
    w, e, gap, p_leads = _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset)
    q = tl.where(p_leads, w * e, w)
    if KIND == "forward_kl":
        rest = w * (1 - e)
        result = tl.where(p_leads, -rest, rest)
    elif KIND == "reverse_kl":
        # Of an infinite loss each column pulls infinitely, none as inf - inf, and one that rounds to 0 not at all.
        result = tl.where(q == 0, 0.0, q * tl.where(gap == -float("inf"), float("inf"), gap * -LN_2 - centre))
    else:
        result = q * (_slope(e, gap, p_leads, lam, KIND, EVEN) - centre)
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
    EVEN: tl.constexpr,  # lam is 1/2
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
    columns = tile_columns(GROUPS, LANES, VECTOR)
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
        result = _gradient(t, s, c, factor, centre, lam, m_t, m_s, reciprocal_t, reciprocal_s, offset, KIND, EVEN)
        tl.store(out_ptr + start + columns, result.to(out_ptr.dtype.element_ty))
    if whole < end:
        inside = whole + columns < end
        t = tl.load(teacher_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        s = tl.load(student_ptr + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
        result = _gradient(t, s, c, factor, centre, lam, m_t, m_s, reciprocal_t, reciprocal_s, offset, KIND, EVEN)
        tl.store(out_ptr + whole + columns, result.to(out_ptr.dtype.element_ty), mask=inside)

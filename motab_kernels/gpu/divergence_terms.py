"""Kernels of `divergence_loss` that need the row's normalisers: terms and gradient.

B rows, T tokens, V shared vocabulary, S splits of it. With gap = log2(p / q), w the larger of p and q and
e = 2^-|gap|, the two are w and w e, and m = lam p + (1 - lam) q is w u with u = 1 - share (1 - e), where `share` is
the smaller one's share in the mixture. So log2(p / m) and log2(q / m) are exact to rounding even where p and q nearly
agree, nothing overflows, and both take two to four special functions. The formulas are in `reference/divergence`.
"""

import triton
import triton.language as tl

from motab_kernels.gpu.divergence_sums import column
from motab_kernels.gpu.online_softmax import (
    in_float32,
    inverse_temperature,
    ln_2,
    log2,
    log2_e,
    lowest,
    scaled,
    tile_columns,
    tile_sum,
)


@triton.jit
def _row(saved_ptr, c):
    """A row's maxima and 1 / z, of the teacher and the student, and the offset: gap = c (t - s) - offset."""
    m_t, m_s = scaled(tl.load(saved_ptr + column("top_t")), c), scaled(tl.load(saved_ptr + column("top_s")), c)
    offset = (m_t - m_s) + tl.load(saved_ptr + column("log_ratio")) * log2_e()
    return m_t, m_s, tl.load(saved_ptr + column("reciprocal_t")), tl.load(saved_ptr + column("reciprocal_s")), offset


@triton.jit
def _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset):
    """w, e, gap and whether p is the larger; where neither has probability, w is 0 and the gap is not NaN."""
    gap = c * (t - tl.maximum(s, lowest())) - offset  # a NaN logit makes the offset NaN, and so every gap of the row
    p_leads = gap > 0
    x = tl.where(p_leads, tl.fma(t, c, -m_t), tl.fma(s, c, -m_s))
    w = tl.exp2(x) * tl.where(p_leads, reciprocal_t, reciprocal_s)
    return w, tl.exp2(-tl.abs(gap)), gap, p_leads


@triton.jit
def _minus_log2(x, u, FAST: tl.constexpr):
    """-log2(u) with u = 1 - x, for 0 <= x < 1: relative error 2e-7 near 0, elsewhere 3e-6.

    Near 0 it is x times a polynomial, minimax in relative error (Remez, 3e-8 before rounding), because log2(u) would
    lose the digits that u lost.
    """
    r = x * 0.39955374598503113 + 0.4793422818183899
    r = r * x + 0.7213671803474426
    r = r * x + 1.4426950216293335
    return tl.where(x < 0.0625, r * x, -log2(u, FAST))


@triton.jit
def _shares(p_leads, lam, rest, EVEN: tl.constexpr):
    """The shares of the larger and the smaller of p and q in the mixture."""
    lead, share = lam, rest
    if not EVEN:
        lead, share = tl.where(p_leads, lam, rest), tl.where(p_leads, rest, lam)
    return lead, share


@triton.jit
def _mixture(e, gap, p_leads, lam, rest, EVEN: tl.constexpr, FAST: tl.constexpr):
    """u = m / w, and minus the logarithms of m over the larger of p and q, and of m over the smaller."""
    lead, share = _shares(p_leads, lam, rest, EVEN)
    u = tl.fma(e, share, lead)
    above = _minus_log2(tl.fma(e, -share, share), u, FAST)
    # A probability that far below the other is 0 to rounding; the bound avoids 0 * inf = NaN.
    return u, above, above - tl.minimum(tl.abs(gap), 200.0)


@triton.jit
def _slope(e, gap, p_leads, lam, rest, KIND: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr):
    """g up to a constant, from p / m - 1 = (1 - lam) (p - q) / m and q / m - 1 = -lam (p - q) / m, which keep the
    digits that p / m and q / m would lose."""
    if KIND == "tvd":
        return tl.where(p_leads, -0.5, tl.where(gap < 0, 0.5, gap))  # 0 at a tie; NaN stays NaN
    u, above, below = _mixture(e, gap, p_leads, lam, rest, EVEN, FAST)
    log_q_m = tl.where(p_leads, below, above)
    signed = tl.where(p_leads, 1 - e, e - 1)  # (p - q) / w
    if KIND == "jsd":
        return rest * ln_2() * log_q_m
    if KIND == "skew_forward_kl":
        return -(rest * rest) * (signed / u)  # which needs no logarithm
    return ln_2() * log_q_m + rest * lam * (signed * tl.exp2(above))


@triton.jit
def _terms(w, e, gap, p_leads, lam, rest, KIND: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr):
    """Each column's terms of the divergence and of sum q g, in units of `_units`."""
    q = tl.where(p_leads, e, 1.0)  # over w
    if KIND == "tvd":
        return w * (1 - e), w * (q * _slope(e, gap, p_leads, lam, rest, KIND, EVEN, FAST))
    _, above, below = _mixture(e, gap, p_leads, lam, rest, EVEN, FAST)
    below *= e  # times the smaller probability, over w; the larger one over w is 1
    q_log = tl.where(p_leads, below, above)
    if KIND == "jsd":
        if EVEN:
            return w * (above + below), w * q_log
        lead, share = _shares(p_leads, lam, rest, EVEN)
        return w * (lead * above + share * below), w * q_log
    signed = tl.where(p_leads, 1 - e, e - 1)  # (p - q) / w
    pull = q * (signed * tl.exp2(above))  # an exponential takes fewer instructions than a division by u
    if KIND == "skew_forward_kl":
        return w * (tl.where(p_leads, above, below) - rest * log2_e() * signed), w * pull
    return w * (q_log + lam * log2_e() * signed), w * (q_log + rest * lam * log2_e() * pull)


@triton.jit
def _units(rest, KIND: tl.constexpr, EVEN: tl.constexpr):
    """The factors of the two sums of `_terms`."""
    if KIND == "tvd":
        return 0.5, 1.0
    if KIND == "jsd":
        return 0.5 * ln_2() if EVEN else ln_2(), rest * ln_2()
    if KIND == "skew_forward_kl":
        return ln_2(), -(rest * rest)
    return ln_2(), ln_2()


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
    rest,  # 1 - lam, from the host: in float32 1 - (1 - 1e-9) would be 0
    KIND: tl.constexpr,
    EVEN: tl.constexpr,  # lam is 1/2
    FAST: tl.constexpr,  # see `log2` and `in_float32`
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
        t = in_float32(tl.load(teacher_ptr + start + columns), FAST)
        s = in_float32(tl.load(student_ptr + start + columns), FAST)
        w, e, gap, p_leads = _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset)
        term, weighted = _terms(w, e, gap, p_leads, lam, rest, KIND, EVEN, FAST)
        divergence += tile_sum(term)
        centre += tile_sum(weighted)
    if whole < end:  # the tail; columns beyond it have no probability
        inside = whole + columns < end
        t = in_float32(tl.load(teacher_ptr + whole + columns, mask=inside, other=-float("inf")), FAST)
        s = in_float32(tl.load(student_ptr + whole + columns, mask=inside, other=-float("inf")), FAST)
        w, e, gap, p_leads = _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset)
        term, weighted = _terms(w, e, gap, p_leads, lam, rest, KIND, EVEN, FAST)
        divergence += tile_sum(term)
        centre += tile_sum(weighted)
    unit, weighted_unit = _units(rest, KIND, EVEN)
    tl.store(terms_ptr, tl.sum(divergence, axis=0) * unit)
    tl.store(terms_ptr + S, tl.sum(centre, axis=0) * weighted_unit)


@triton.jit
def _gradient(
    t,
    s,
    c,
    factor,
    per_cap,
    centre,
    lam,
    rest,
    row,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    m_t, m_s, reciprocal_t, reciprocal_s, offset = row
    w, e, gap, p_leads = _pair(t, s, c, m_t, m_s, reciprocal_t, reciprocal_s, offset)
    if HAS_SOFTCAP:
        factor *= 1 - (s * per_cap) * (s * per_cap)
    if KIND == "forward_kl":
        apart = w * (1 - e)
        # A column that the student excludes has no gradient, even if the teacher gives it probability.
        return tl.where(s == -float("inf"), 0.0, tl.where(p_leads, -apart, apart) * factor)
    q = tl.where(p_leads, w * e, w)
    if KIND == "reverse_kl":
        # An infinite loss makes each column's gradient infinite, not inf - inf = NaN; 0 where q rounds to 0.
        pull = tl.where(gap == -float("inf"), float("inf"), gap * -ln_2() - centre)
        return tl.where(q == 0, 0.0, q * pull) * factor
    return q * (_slope(e, gap, p_leads, lam, rest, KIND, EVEN, FAST) - centre) * factor


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
    rest,  # 1 - lam, from the host: in float32 1 - (1 - 1e-9) would be 0
    per_cap,  # 1 / softcap
    KIND: tl.constexpr,
    EVEN: tl.constexpr,  # lam is 1/2
    FAST: tl.constexpr,  # see `log2` and `in_float32`
    HAS_SOFTCAP: tl.constexpr,  # the student's logits are softcap * tanh(x / softcap), and the gradient is by x
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
    factor = scale * (c * ln_2())
    saved_ptr += position * 6
    row = _row(saved_ptr, c)
    centre = tl.load(saved_ptr + column("centre"))
    for start in range(first, whole, TILE):
        t = in_float32(tl.load(teacher_ptr + start + columns), FAST)
        s = in_float32(tl.load(student_ptr + start + columns), FAST)
        result = _gradient(t, s, c, factor, per_cap, centre, lam, rest, row, KIND, EVEN, FAST, HAS_SOFTCAP)
        tl.store(out_ptr + start + columns, result.to(out_ptr.dtype.element_ty))
    if whole < end:
        inside = whole + columns < end
        t = in_float32(tl.load(teacher_ptr + whole + columns, mask=inside, other=-float("inf")), FAST)
        s = in_float32(tl.load(student_ptr + whole + columns, mask=inside, other=-float("inf")), FAST)
        result = _gradient(t, s, c, factor, per_cap, centre, lam, rest, row, KIND, EVEN, FAST, HAS_SOFTCAP)
        tl.store(out_ptr + whole + columns, result.to(out_ptr.dtype.element_ty), mask=inside)

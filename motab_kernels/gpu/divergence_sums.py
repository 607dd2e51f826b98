"""First kernels of `divergence_loss`: the sums over each split of the vocabulary, and their combination.

B rows, T tokens, V shared vocabulary, S splits of it. The sums are those of `motab_kernels.divergence_sums`, with x in
units of log2 while they are summed; they are stored in nats. Everything is summed in float32.
"""

import triton
import triton.language as tl

from motab_kernels.gpu.online_softmax import (
    in_float32,
    inverse_temperature,
    ln_2,
    log2_e,
    lowest,
    moved,
    scaled,
    tile_columns,
    tile_max,
    tile_sum,
    weighted,
)


@triton.constexpr_function
def row(name):
    """Of the sums (positions, 6, S)."""
    return {"top_t": 0, "z_t": 1, "g_t": 2, "top_s": 3, "z_s": 4, "g_s": 5}[name]


@triton.constexpr_function
def column(name):
    """Of the saved tensor (positions, 6), in the order of `motab_kernels.divergence_sums`."""
    return {"top_t": 0, "top_s": 1, "reciprocal_t": 2, "reciprocal_s": 3, "log_ratio": 4, "centre": 5}[name]


@triton.jit
def _add_tile(t, s, c, top_t, z_t, g_t, top_s, z_s, g_s, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """Add a (GROUPS, LANES, VECTOR) tile to the lanes' sums. No value crosses lanes."""
    new_top_t, new_top_s = tl.maximum(top_t, tile_max(t)), tl.maximum(top_s, tile_max(s))
    m_t, m_s = scaled(new_top_t, c), scaled(new_top_s, c)
    d_t, d_s = scaled(top_t, c) - m_t, scaled(top_s, c) - m_s
    f_t, f_s = tl.exp2(d_t), tl.exp2(d_s)
    x_t, x_s = tl.fma(t, c, -m_t[None, :, None]), tl.fma(s, c, -m_s[None, :, None])
    w_t, w_s = tl.exp2(x_t), tl.exp2(x_s)
    if FORWARD:
        g_t = moved(f_t, g_t, d_t - d_s, z_t) + tile_sum(weighted(w_t, x_t - x_s, True))
    if REVERSE:
        g_s = moved(f_s, g_s, d_t - d_s, z_s) + tile_sum(weighted(w_s, x_t - x_s, True))
    z_t, z_s = z_t * f_t + tile_sum(w_t), z_s * f_s + tile_sum(w_s)
    return new_top_t, z_t, g_t, new_top_s, z_s, g_s


@triton.jit
def sums_kernel(
    student_ptr,
    teacher_ptr,
    keep_ptr,
    temperature_ptr,
    sums_ptr,
    student_stride_b,
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    temperature_stride_b,
    T,
    V,
    HAS_KEEP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    FAST: tl.constexpr,  # see `in_float32`
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sum up split `program_id(1)` of position `program_id(0)`, the axis that may be long."""
    position, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if HAS_KEEP:
        if tl.load(keep_ptr + position) == 0:
            return  # its sums are never read
    b, i = position // T, position % T
    student_ptr += b * student_stride_b + i * student_stride_t
    teacher_ptr += b * teacher_stride_b + i * teacher_stride_t
    c = inverse_temperature(temperature_ptr + b * temperature_stride_b, HAS_TEMPERATURE)

    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    columns = tile_columns(GROUPS, LANES, VECTOR)
    top_t, top_s = tl.full([LANES], lowest(), tl.float32), tl.full([LANES], lowest(), tl.float32)
    zeros = tl.zeros([LANES], tl.float32)
    z_t, g_t, z_s, g_s = zeros, zeros, zeros, zeros
    first = split * (TILES * TILE)
    end = tl.minimum(first + TILES * TILE, V)
    whole = first + (end - first) // TILE * TILE
    for start in range(first, whole, TILE):
        t = in_float32(tl.load(teacher_ptr + start + columns), FAST)
        s = in_float32(tl.load(student_ptr + start + columns), FAST)
        top_t, z_t, g_t, top_s, z_s, g_s = _add_tile(t, s, c, top_t, z_t, g_t, top_s, z_s, g_s, FORWARD, REVERSE)
    if whole < end:  # the tail; columns beyond it have no probability
        inside = whole + columns < end
        t = in_float32(tl.load(teacher_ptr + whole + columns, mask=inside, other=-float("inf")), FAST)
        s = in_float32(tl.load(student_ptr + whole + columns, mask=inside, other=-float("inf")), FAST)
        top_t, z_t, g_t, top_s, z_s, g_s = _add_tile(t, s, c, top_t, z_t, g_t, top_s, z_s, g_s, FORWARD, REVERSE)

    row_t, row_s = tl.max(top_t, axis=0), tl.max(top_s, axis=0)
    d_t, d_s = scaled(top_t, c) - scaled(row_t, c), scaled(top_s, c) - scaled(row_s, c)
    f_t, f_s = tl.exp2(d_t), tl.exp2(d_s)
    S = tl.num_programs(1)
    sums_ptr += position * 6 * S + split
    tl.store(sums_ptr + row("top_t") * S, row_t)
    tl.store(sums_ptr + row("z_t") * S, tl.sum(z_t * f_t, axis=0))
    tl.store(sums_ptr + row("g_t") * S, tl.sum(moved(f_t, g_t, d_t - d_s, z_t), axis=0) * ln_2())
    tl.store(sums_ptr + row("top_s") * S, row_s)
    tl.store(sums_ptr + row("z_s") * S, tl.sum(z_s * f_s, axis=0))
    tl.store(sums_ptr + row("g_s") * S, tl.sum(moved(f_s, g_s, d_t - d_s, z_s), axis=0) * ln_2())


@triton.jit
def finish_kernel(
    sums_ptr,
    keep_ptr,
    temperature_ptr,
    loss_ptr,
    saved_ptr,
    temperature_stride_b,
    T,
    R,
    S,
    HAS_KEEP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    FORWARD: tl.constexpr,
    ROWS: tl.constexpr,
    S_BLOCK: tl.constexpr,
):
    """`finish` of `motab_kernels.reference.divergence` for ROWS positions."""
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = position < R
    keep = inside
    if HAS_KEEP:
        keep = inside & (tl.load(keep_ptr + position, mask=inside, other=0) != 0)
    temperature = tl.full([ROWS], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        b = position // T
        temperature = tl.load(temperature_ptr + b * temperature_stride_b, mask=inside, other=1.0).to(tl.float32)
    c = (tl.full([ROWS], log2_e(), tl.float32) / temperature)[:, None]
    split = tl.arange(0, S_BLOCK)[None, :]
    there = keep[:, None] & (split < S)
    sums = sums_ptr + position[:, None] * (6 * S) + split
    top_t = tl.load(sums + row("top_t") * S, mask=there, other=lowest())
    top_s = tl.load(sums + row("top_s") * S, mask=there, other=lowest())
    row_t, row_s = tl.max(top_t, axis=1), tl.max(top_s, axis=1)
    d_t, d_s = scaled(top_t, c) - scaled(row_t[:, None], c), scaled(top_s, c) - scaled(row_s[:, None], c)
    f_t, f_s = tl.exp2(d_t), tl.exp2(d_s)
    part_z_t = tl.load(sums + row("z_t") * S, mask=there, other=0.0)
    part_z_s = tl.load(sums + row("z_s") * S, mask=there, other=0.0)
    z_t, z_s = tl.sum(part_z_t * f_t, axis=1), tl.sum(part_z_s * f_s, axis=1)
    # A side without a softmax: NaN or +inf makes z NaN, no finite logit makes it 0.
    valid = (z_t > 0) & (z_s > 0)
    log_ratio = tl.where(valid, tl.log2(z_t / z_s) * ln_2(), float("nan"))
    shift = (d_t - d_s) * ln_2()
    if FORWARD:
        g_t = tl.load(sums + row("g_t") * S, mask=there, other=0.0)
        loss = tl.sum(moved(f_t, g_t, shift, part_z_t), axis=1) / z_t - log_ratio
    else:
        g_s = tl.load(sums + row("g_s") * S, mask=there, other=0.0)
        loss = log_ratio - tl.sum(moved(f_s, g_s, shift, part_z_s), axis=1) / z_s
    loss = tl.where(loss < 0, 0.0, loss)
    tl.store(loss_ptr + position, tl.where(keep, loss, 0.0), mask=inside)
    saved_ptr += position * 6
    tl.store(saved_ptr + column("top_t"), row_t, mask=inside)
    tl.store(saved_ptr + column("top_s"), row_s, mask=inside)
    tl.store(saved_ptr + column("reciprocal_t"), 1 / z_t, mask=inside)
    tl.store(saved_ptr + column("reciprocal_s"), 1 / z_s, mask=inside)
    tl.store(saved_ptr + column("log_ratio"), log_ratio, mask=inside)
    tl.store(saved_ptr + column("centre"), loss, mask=inside)

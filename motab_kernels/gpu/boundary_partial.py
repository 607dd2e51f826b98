"""First kernel of `fused_kl_boundary`: sums over a split of the vocabulary.

B rows, T tokens, V shared vocabulary, S splits of it. With t, s the logits at a position, c = log2(e) /
temperature and m_t, m_s the maxima of c t and c s, a split is summed up in

    z_t = sum w_t      a_t = sum w_t x_t      g_t = sum w_t (x_t - x_s)      x_t = c t - m_t      w_t = 2^x_t
    z_s = sum w_s      a_s = sum w_s x_s      g_s = sum w_s (x_t - x_s)      x_s = c s - m_s      w_s = 2^x_s

from which, over log2(e),

    entropy = log2 z - a / z
    forward_kl = g_t / z_t - log2(z_t / z_s)
    reverse_kl = log2(z_t / z_s) - g_s / z_s.

When the maxima move by d_t = m_t - m_t' and d_s,   z' = f z,   a' = f (a + d z),   g' = f (g + (d_t - d_s) z)
with f = 2^d. This rule adds a tile to its lanes, and combines the lanes of a split and the splits of a row. x is one
fused multiply-add, which rounds once, so that a constant added to all logits of a side does no harm, even where m is
not exactly the maximum.

Low-precision logits are read into float32, and everything is summed in float32.
"""

import triton
import triton.language as tl

from motab_kernels.gpu.online_softmax import (
    in_float32,
    inverse_temperature,
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
    """Of the workspace (positions, 10, S)."""
    teacher, student = {"top_t": 0, "z_t": 1, "a_t": 2, "g_t": 3}, {"top_s": 4, "z_s": 5, "a_s": 6, "g_s": 7}
    return {**teacher, **student, "rank": 8, "argmax": 9}[name]


@triton.constexpr_function
def rows():
    return 10


@triton.jit
def _add_tile(
    t, s, start, token_logit, c, top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best, GUARDED: tl.constexpr
):
    """Add a (GROUPS, LANES, VECTOR) tile to the lanes' sums. No value crosses lanes."""
    tile_top = tile_max(t)
    best = tl.where(tile_top > top_t, start, best)  # the first tile with the lane's maximum
    new_top_t, new_top_s = tl.maximum(top_t, tile_top), tl.maximum(top_s, tile_max(s))
    m_t, m_s = scaled(new_top_t, c), scaled(new_top_s, c)
    d_t, d_s = scaled(top_t, c) - m_t, scaled(top_s, c) - m_s
    f_t, f_s = tl.exp2(d_t), tl.exp2(d_s)
    a_t, g_t, z_t = moved(f_t, a_t, d_t, z_t), moved(f_t, g_t, d_t - d_s, z_t), z_t * f_t
    a_s, g_s, z_s = moved(f_s, a_s, d_s, z_s), moved(f_s, g_s, d_t - d_s, z_s), z_s * f_s

    x_t, x_s = tl.fma(t, c, -m_t[None, :, None]), tl.fma(s, c, -m_s[None, :, None])
    w_t, w_s = tl.exp2(x_t), tl.exp2(x_s)
    gap = x_t - x_s
    z_t += tile_sum(w_t)
    a_t += tile_sum(weighted(w_t, x_t, GUARDED))
    g_t += tile_sum(weighted(w_t, gap, GUARDED))
    z_s += tile_sum(w_s)
    a_s += tile_sum(weighted(w_s, x_s, GUARDED))
    g_s += tile_sum(weighted(w_s, gap, GUARDED))
    rank += tile_sum((t > token_logit).to(tl.float32))  # whole numbers, exact up to 2^24
    return new_top_t, z_t, a_t, g_t, new_top_s, z_s, a_s, g_s, rank, best


@triton.jit
def _summed_up(
    student_ptr,
    teacher_ptr,
    columns,
    first,
    whole,
    end,
    token_logit,
    c,
    GUARDED: tl.constexpr,
    FAST: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums over columns `first` to `end`, and of each lane its maximum with the first tile that has it.

    GUARDED: also where a logit is -inf; else one that is makes sums NaN. The tail always is."""
    top_t, top_s = tl.full([LANES], lowest(), tl.float32), tl.full([LANES], lowest(), tl.float32)
    zeros = tl.zeros([LANES], tl.float32)
    z_t, a_t, g_t, z_s, a_s, g_s, rank = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    best = tl.zeros([LANES], tl.int32) + first
    for start in range(first, whole, TILE):
        t = in_float32(tl.load(teacher_ptr + start + columns), FAST)
        s = in_float32(tl.load(student_ptr + start + columns), FAST)
        top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best = _add_tile(
            t, s, start, token_logit, c, top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best, GUARDED
        )
    if whole < end:  # the tail; columns beyond it have no probability
        inside = whole + columns < end
        t = in_float32(tl.load(teacher_ptr + whole + columns, mask=inside, other=-float("inf")), FAST)
        s = in_float32(tl.load(student_ptr + whole + columns, mask=inside, other=-float("inf")), FAST)
        top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best = _add_tile(
            t, s, whole, token_logit, c, top_t, z_t, a_t, g_t, top_s, z_s, a_s, g_s, rank, best, True
        )
    row_t, row_s = tl.max(top_t, axis=0), tl.max(top_s, axis=0)
    d_t, d_s = scaled(top_t, c) - scaled(row_t, c), scaled(top_s, c) - scaled(row_s, c)
    f_t, f_s = tl.exp2(d_t), tl.exp2(d_s)
    a_t, a_s = tl.sum(moved(f_t, a_t, d_t, z_t), axis=0), tl.sum(moved(f_s, a_s, d_s, z_s), axis=0)
    g_t, g_s = tl.sum(moved(f_t, g_t, d_t - d_s, z_t), axis=0), tl.sum(moved(f_s, g_s, d_t - d_s, z_s), axis=0)
    z_t, z_s = tl.sum(z_t * f_t, axis=0), tl.sum(z_s * f_s, axis=0)
    return row_t, z_t, a_t, g_t, row_s, z_s, a_s, g_s, tl.sum(rank, axis=0), top_t, best


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
    FAST: tl.constexpr,  # see `in_float32`
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
        return  # padding: its sums are never read
    student_ptr += b * student_stride_b + i * student_stride_t
    teacher_ptr += b * teacher_stride_b + i * teacher_stride_t
    known = (token >= 0) & (token < V)
    token_logit = tl.load(teacher_ptr + token, mask=known, other=0.0).to(tl.float32)
    # `lowest` is not a bfloat16: otherwise the compiler would compare in bfloat16, with twice the instructions.
    token_logit = tl.where(known, token_logit, lowest())
    c = inverse_temperature(temperature_ptr + b * temperature_stride_b, HAS_TEMPERATURE)

    TILE: tl.constexpr = GROUPS * LANES * VECTOR
    columns = tile_columns(GROUPS, LANES, VECTOR)
    first = split * (TILES * TILE)
    end = tl.minimum(first + TILES * TILE, V)
    whole = first + (end - first) // TILE * TILE
    row_t, z_t, a_t, g_t, row_s, z_s, a_s, g_s, rank, top_t, best = _summed_up(
        student_ptr, teacher_ptr, columns, first, whole, end, token_logit, c, False, FAST, LANES, TILE
    )
    # Guards would take a fifth of the loop's instructions. Only a split that holds -inf or NaN needs them: it is summed
    # up again. Where nothing is NaN, both give the same bits.
    if (a_t != a_t) | (g_t != g_t) | (a_s != a_s) | (g_s != g_s):
        _, _, a_t, g_t, _, _, a_s, g_s, _, _, _ = _summed_up(
            student_ptr, teacher_ptr, columns, first, whole, end, token_logit, c, True, FAST, LANES, TILE
        )

    # The first maximum lies in the earliest tile that has it: search that tile again, in the lanes that saw it.
    tile = tl.min(tl.where(top_t == row_t, best, V), axis=0)
    columns += tile // TILE * TILE  # which says that it is a multiple
    seen = ((top_t == row_t) & (best == tile))[None, :, None]
    if tile < whole:  # its loads are of 128 bits, which a mask by column would cut
        t = in_float32(tl.load(teacher_ptr + columns, mask=seen, other=-float("inf")), FAST)
    else:
        t = in_float32(tl.load(teacher_ptr + columns, mask=seen & (columns < end), other=-float("inf")), FAST)
    argmax = tl.min(tl.min(tl.min(tl.where(t == row_t, columns, V), axis=2), axis=0), axis=0)

    S = tl.num_programs(1)
    partial_ptr += position.to(tl.int64) * rows() * S + split
    tl.store(partial_ptr + row("top_t") * S, row_t)
    tl.store(partial_ptr + row("z_t") * S, z_t)
    tl.store(partial_ptr + row("a_t") * S, a_t)
    tl.store(partial_ptr + row("g_t") * S, g_t)
    tl.store(partial_ptr + row("top_s") * S, row_s)
    tl.store(partial_ptr + row("z_s") * S, z_s)
    tl.store(partial_ptr + row("a_s") * S, a_s)
    tl.store(partial_ptr + row("g_s") * S, g_s)
    tl.store(partial_ptr + row("rank") * S, rank)
    tl.store(partial_ptr + row("argmax") * S, (argmax - first).to(tl.float32))  # within the split, exact

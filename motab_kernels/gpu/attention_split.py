"""First kernel of `ragged_attention`: sum up a split of the slots for a tile of a kv head's queries.

b rows of queries, T new tokens, H_q and H heads of queries and of keys, GROUP = H_q / H, D head size. A kv
head has T * GROUP queries, m = token * GROUP + head in the group; a program takes a tile of them and reads the head's
keys and values once for all. With x the scores in units of log2, a split of the slots is summed up in

    top = max x      total = sum 2^(x - top)      acc = sum 2^(x - top) values

in float32, and splits are combined by the rule by which a split combines its tiles. A split begins at a multiple of a
size that the queries of a row decide, so that a row's numbers depend only on the row.
"""

import triton
import triton.language as tl

from motab_kernels.gpu.online_softmax import log2_e, lowest


@triton.jit
def _tanh(y):
    """tanh, which the interpreter lacks. Near 0, where the formula would lose digits, a polynomial (Cephes, tanhf)."""
    z = y * y
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = y + y * z * (p * z - 3.33332819422e-1)
    return tl.where(tl.abs(y) < 0.625, near, 1 - 2 / (1 + tl.exp2(y * (2 * log2_e()))))


@triton.jit
def with_sinks(top, total, acc, sinks):
    """Add the sinks, which are scores without values."""
    sinks = sinks.to(tl.float32) * log2_e()
    new_top = tl.maximum(top, sinks)
    factor = tl.exp2(top - new_top)
    return total * factor + tl.exp2(sinks - new_top), acc * factor[:, None]


@triton.jit(do_not_specialize=["visible_length"])  # grows as rows do
def split_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    page_table_ptr,
    sinks_ptr,
    partial_ptr,
    out_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    keys_stride_b,
    keys_stride_h,
    keys_stride_s,
    values_stride_b,
    values_stride_h,
    values_stride_s,
    lengths_stride_b,
    page_table_stride_b,
    page_table_stride_n,
    sinks_stride_h,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    scale,
    softcap,
    window,
    visible_length,
    T,
    H,
    HAS_PAGE_TABLE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Sum up split `program_id(1)` for a tile of queries; without splits, write the result.

    A row's slots lie in pages of PAGE, a multiple of N_BLOCK, or, if that is 0, all in one.
    """
    ONE_PAGE: tl.constexpr = PAGE == 0 or (IS_SPLIT and PAGE % SPLIT == 0)  # else a tile looks its own up
    tiles = tl.cdiv(T * GROUP, M_BLOCK)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i, head = (head // H).to(tl.int64), (head % H).to(tl.int64)
    length = tl.load(lengths_ptr + i * lengths_stride_b)
    length = tl.minimum(tl.maximum(length, 0), visible_length - T).to(tl.int32)
    page_table_ptr += i * page_table_stride_b

    # The tile's queries see no slot outside [begin, end). Without a window all of them see the slots before `common`.
    # A tile of slots begins at a multiple of its size: it lies in one page, and sums do not depend on where pages end.
    common = length + tile * M_BLOCK // GROUP + 1
    begin = tl.maximum(common - window, 0) // N_BLOCK * N_BLOCK
    end = length + tl.minimum((tile * M_BLOCK + M_BLOCK - 1) // GROUP, T - 1) + 1
    if IS_SPLIT:
        split = tl.program_id(1) * SPLIT
        begin, end = tl.maximum(begin, split), tl.minimum(end, split + SPLIT)
        if begin >= end:
            return
    # Whole tiles that need no mask come first. With a window all tiles are masked: a third loop would cost registers.
    tail = begin
    if not HAS_WINDOW:
        tail += tl.maximum(tl.minimum(common, end) - begin, 0) // N_BLOCK * N_BLOCK

    m, n, d = tile * M_BLOCK + tl.arange(0, M_BLOCK), tl.arange(0, N_BLOCK), tl.arange(0, D_BLOCK)
    token, member = m // GROUP, m % GROUP
    inside = (token[:, None] < T) & (d[None, :] < D)
    query_ptr += i * query_stride_b + head * GROUP * query_stride_h + d[None, :]
    offsets = token.to(tl.int64) * query_stride_t + member.to(tl.int64) * query_stride_h
    query = tl.load(query_ptr + offsets[:, None], mask=inside, other=0.0)
    keys_ptr += head * keys_stride_h
    values_ptr += head * values_stride_h
    if ONE_PAGE:
        page, place = i, tl.cast(0, tl.int64)
        if PAGE > 0:
            place = tl.cast(begin // PAGE, tl.int64)
        if HAS_PAGE_TABLE:
            page = tl.load(page_table_ptr + place * page_table_stride_n)
        # Slots are counted from the row's first one, wherever the page lies.
        keys_ptr += page * keys_stride_b - place * PAGE * keys_stride_s
        values_ptr += page * values_stride_b - place * PAGE * values_stride_s
    # In 32 bits, for which the launcher sees to it that they are enough: in 64 registers spill on an A100.
    keys_offsets = n[:, None] * keys_stride_s + d[None, :]
    values_offsets = n[:, None] * values_stride_s + d[None, :]

    top = tl.full([M_BLOCK], lowest(), tl.float32)  # unlike -inf, no NaN for a query that sees nothing yet
    total = tl.zeros([M_BLOCK], tl.float32)
    acc = tl.zeros([M_BLOCK, D_BLOCK], tl.float32)
    for masked in tl.static_range(1 if HAS_WINDOW else 0, 2):
        first, last = begin, tail
        if masked:
            first, last = tail, end
        for start in tl.range(first, last, N_BLOCK):
            k_ptr, v_ptr, before = keys_ptr, values_ptr, tl.cast(start, tl.int64)
            if not ONE_PAGE:
                page = tl.load(page_table_ptr + before // PAGE * page_table_stride_n)
                k_ptr += page * keys_stride_b
                v_ptr += page * values_stride_b
                before %= PAGE
            k_ptr = k_ptr + before * keys_stride_s + keys_offsets
            v_ptr = v_ptr + before * values_stride_s + values_offsets
            slot = start + n
            if masked:  # load 0 where nothing is seen: a NaN there would outlast a weight of 0
                there = (slot[:, None] < end) & (d[None, :] < D)
                if HAS_WINDOW:
                    there = there & (slot[:, None] >= common - window)
                k, v = tl.load(k_ptr, mask=there, other=0.0), tl.load(v_ptr, mask=there, other=0.0)
            elif D == D_BLOCK:
                k, v = tl.load(k_ptr), tl.load(v_ptr)
            else:
                k = tl.load(k_ptr, mask=d[None, :] < D, other=0.0)
                v = tl.load(v_ptr, mask=d[None, :] < D, other=0.0)
            x = tl.dot(query, tl.trans(k), input_precision="ieee")
            if HAS_SOFTCAP:
                x = softcap * _tanh(x * scale)
            else:
                x = x * scale
            if masked:
                behind = (length + token)[:, None] - slot[None, :]
                seen = (behind >= 0) & (slot[None, :] < end)
                if HAS_WINDOW:
                    seen = seen & (behind < window)
                x = tl.where(seen, x, -float("inf"))
            new_top = tl.maximum(top, tl.max(x, axis=1))
            factor = tl.exp2(top - new_top)
            weights = tl.exp2(x - new_top[:, None])
            top, total = new_top, total * factor + tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")

    if IS_SPLIT:
        query_index = (i * H + head) * T * GROUP + m
        partial_ptr += (query_index * tl.num_programs(1) + tl.program_id(1)) * (D + 4)
        tl.store(partial_ptr[:, None] + d[None, :], acc, mask=inside)
        tl.store(partial_ptr + D, top, mask=token < T)
        tl.store(partial_ptr + D + 1, total, mask=token < T)
    else:
        if HAS_SINKS:
            sinks = tl.load(sinks_ptr + (head * GROUP + member) * sinks_stride_h)
            total, acc = with_sinks(top, total, acc, sinks)
        out_ptr += i * out_stride_b + head * GROUP * out_stride_h + d[None, :]
        offsets = token.to(tl.int64) * out_stride_t + member * out_stride_h
        tl.store(out_ptr + offsets[:, None], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)

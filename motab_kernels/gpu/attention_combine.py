"""Second kernel of `ragged_attention`: combine the splits that a query sees. The sums are `attention_split`'s."""

import triton
import triton.language as tl

from motab_kernels.gpu.attention_split import with_sinks
from motab_kernels.gpu.online_softmax import lowest


@triton.jit(do_not_specialize=["visible_length", "S"])
def combine_kernel(
    partial_ptr,
    lengths_ptr,
    sinks_ptr,
    out_ptr,
    lengths_stride_b,
    sinks_stride_h,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    window,
    visible_length,
    T,
    H,
    S,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    S_BLOCK: tl.constexpr,
):
    """Combine the S splits of query `program_id(0)`, those that it sees, S_BLOCK at a time."""
    query = tl.program_id(0).to(tl.int64)
    m, head = query % (T * GROUP), query // (T * GROUP)
    i, token, head = head // H, m // GROUP, head % H * GROUP + m % GROUP
    length = tl.load(lengths_ptr + i * lengths_stride_b)
    position = (tl.minimum(tl.maximum(length, 0), visible_length - T) + token).to(tl.int32)
    begin, end = tl.maximum(position + 1 - window, 0) // SPLIT, position // SPLIT + 1
    d = tl.arange(0, D_BLOCK)
    # A tile of one query, so that `with_sinks` serves both kernels.
    top, total = tl.full([1], lowest(), tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([1, D_BLOCK], tl.float32)
    for start in range(begin, end, S_BLOCK):
        split = start + tl.arange(0, S_BLOCK)
        there = split < end  # the others are not written
        partials = partial_ptr + (query * S + split) * (D + 4)
        tops = tl.load(partials + D, mask=there, other=lowest())
        totals = tl.load(partials + D + 1, mask=there, other=0.0)
        accs = tl.load(partials[:, None] + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        factor, factors = tl.exp2(top - new_top), tl.exp2(tops - new_top)
        top, total = new_top, total * factor + tl.sum(totals * factors, axis=0)
        acc = acc * factor[:, None] + tl.sum(accs * factors[:, None], axis=0)[None, :]
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + head * sinks_stride_h + tl.arange(0, 1))
        total, acc = with_sinks(top, total, acc, sinks)
    out_ptr += i * out_stride_b + head * out_stride_h + token * out_stride_t
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + d[None, :], out, mask=d[None, :] < D)

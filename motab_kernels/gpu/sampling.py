"""`sample_from_logits` on Triton: one launch, a program a row, which reads its row several times, from cache.

B rows, T tokens, V vocabulary. The filters keep logits from some least one on. It is searched for without a sort, in
the logits' bits, which as integers are in the order of the numbers: two bits a pass, from the highest in which the
bounds of the search differ. Each pass sums up what lies above three numbers. No atomics, and the host does not wait.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from motab_kernels.gpu import launch, launched_on
from motab_kernels.gpu.online_softmax import log2_e, lowest
from motab_kernels.gpu.tuned import tuned


class Settings(NamedTuple):
    """A tile has a lane of 128 bits a thread."""

    lanes: int = 512
    num_warps: int = 16


DEFAULT = Settings()
HIP = Settings(num_warps=8)  # a wave has 64 threads

#: Bits at the end of a float32 that are all alike in a number of the other types.
GRANULES = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def settings_for(device: torch.device) -> Settings:
    return tuned("sampling", device, DEFAULT, HIP)


@triton.jit
def _turned(bits):
    """Between the bits of a float32 and an integer in the numbers' order, either way."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(x):
    return _turned(x.to(tl.int32, bitcast=True)).to(tl.int64)


@triton.jit
def _number(key):
    """At most +inf, where no logit lies."""
    return _turned(tl.minimum(key, 0x7F800000).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _tile(row_ptr, start, columns, V):
    return tl.load(row_ptr + start + columns, mask=start + columns < V, other=-float("inf")).to(tl.float32)


@triton.jit
def _weights(x, top, c):
    return tl.exp2((x - top) * c)


@triton.jit
def _total(row_ptr, columns, V, top, c, least, LANES: tl.constexpr, TILE: tl.constexpr):
    """The sum of the weights of the logits from `least` on."""
    sums = tl.zeros([LANES], tl.float32)
    for start in range(0, V, TILE):
        x = _tile(row_ptr, start, columns, V)
        sums += tl.sum(tl.where(x >= least, _weights(x, top, c), 0.0), axis=1)
    return tl.sum(sums, axis=0)


@triton.jit
def _search(
    row_ptr,
    columns,
    V,
    top,
    c,
    least,
    target,
    COUNTS: tl.constexpr,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest number from `least` on from which the weights of logits sum to the target, or with COUNTS their
    number is at least the target; `least` if not even from there."""
    key = _key(least) >> GRANULE << GRANULE
    span = _key(top) - key
    digits = 0
    for i in tl.static_range(16 - GRANULE // 2):
        digits += (span >> (GRANULE + 2 * i) > 0).to(tl.int32)
    for i in range(digits):
        step = tl.full([], 1, tl.int64) << (GRANULE + 2 * (digits - 1 - i))
        first, second, third = _number(key + step), _number(key + 2 * step), _number(key + 3 * step)
        zeros = tl.zeros([LANES], tl.float32)
        from_first, from_second, from_third = zeros, zeros, zeros
        for start in range(0, V, TILE):
            x = _tile(row_ptr, start, columns, V)
            if COUNTS:
                weights = tl.full(x.shape, 1.0, tl.float32)  # whose sums are exact up to 2^24
            else:
                weights = _weights(x, top, c)
            from_first += tl.sum(tl.where(x >= first, weights, 0.0), axis=1)
            from_second += tl.sum(tl.where(x >= second, weights, 0.0), axis=1)
            from_third += tl.sum(tl.where(x >= third, weights, 0.0), axis=1)
        # Sums over fewer logits are not larger, rounded in the same order as they are.
        key += tl.where(tl.sum(from_first, axis=0) >= target, step, 0)
        key += tl.where(tl.sum(from_second, axis=0) >= target, step, 0)
        key += tl.where(tl.sum(from_third, axis=0) >= target, step, 0)
    return _number(key)


@triton.jit(do_not_specialize=["c", "top_k", "top_p", "min_p"])
def sample_kernel(
    logits_ptr,
    uniforms_ptr,
    tokens_ptr,
    valid_ptr,
    logits_stride_b,
    logits_stride_t,
    uniforms_stride_b,
    uniforms_stride_t,
    T,
    V,
    c,
    top_k,
    top_p,
    min_p,
    OF_ROWS: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    GRANULE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
):
    """Draw the token of position `program_id(0)`; c is log2(e) / temperature. Where OF_ROWS says so, there are pointers
    instead: of rows' temperatures, top_k, top_p and min_p."""
    position = tl.program_id(0).to(tl.int64)
    b, i = position // T, position % T
    row_ptr = logits_ptr + b * logits_stride_b + i * logits_stride_t
    TILE: tl.constexpr = LANES * VECTOR
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # The host has not seen the values of a tensor. The ranges are those of `SETTINGS`.
    fits, is_greedy = tl.full([], True, tl.int1), tl.full([], False, tl.int1)
    if OF_ROWS[0]:
        temperature_ptr = c
        temperature = tl.load(temperature_ptr + b).to(tl.float64)
        is_greedy = temperature == 0
        fits &= is_greedy | ((temperature >= 1e-30) & (temperature <= 1.01e30))  # float32's 1e30 is a little more
        c = (log2_e() / tl.where(is_greedy, 1.0, temperature)).to(tl.float32)
    if OF_ROWS[1]:
        top_k = tl.load(top_k + b)
        fits &= top_k >= 0
    if OF_ROWS[2]:
        top_p = tl.load(top_p + b)
        fits &= (top_p > 0) & (top_p <= 1)
        top_p = top_p.to(tl.float32)
    if OF_ROWS[3]:
        min_p = tl.load(min_p + b)
        fits &= (min_p >= 0) & (min_p <= 1)
        min_p = min_p.to(tl.float32)

    tops, undefined = tl.full([LANES], -float("inf"), tl.float32), tl.zeros([LANES], tl.float32)
    for start in range(0, V, TILE):
        x = _tile(row_ptr, start, columns, V)
        tops = tl.maximum(tops, tl.max(x, axis=1))
        undefined += tl.sum((x != x).to(tl.float32), axis=1)
    tops += 0.0  # Triton's compiler stops where two reductions use what a loop leaves
    top = tl.max(tops, axis=0)
    valid = fits & (tl.sum(undefined, axis=0) == 0) & (tl.abs(top) < float("inf"))
    tl.store(valid_ptr + position, valid)
    if not valid:
        tl.store(tokens_ptr + position, tl.full([], 0, tl.int64))
        return
    least = tl.where(is_greedy, top, lowest())
    if HAS_TOP_K:
        # The lanes' largest are logits of different columns: so many are not below the least of them.
        least = tl.where((top_k > 0) & (top_k <= LANES), tl.maximum(tl.min(tops, axis=0), least), least)
        end = tl.where((top_k > 0) & (top_k < V), top, least)  # where all are kept there is nothing to search
        least = _search(row_ptr, columns, V, end, c, least, top_k, True, GRANULE, LANES, TILE)
    if HAS_TOP_P:
        if not OF_ROWS[2] or top_p < 1:
            total = _total(row_ptr, columns, V, top, c, least, LANES, TILE)
            # Logits below this have a share of less than 1 - top_p, all together. Rounding must not raise it.
            bound = top + (tl.log2((1 - top_p) * total / V) - 0.001) / c - 1e-6 * tl.abs(top)
            least = tl.maximum(least, bound)
            least = _search(row_ptr, columns, V, top, c, least, top_p * total, False, GRANULE, LANES, TILE)
            least = tl.minimum(least, top)  # above which the search ends where float32 rounds top_p to 0

    tile = tl.arange(0, TILES_BLOCK)
    sums = tl.zeros([TILES_BLOCK], tl.float32)
    for start in range(0, V, TILE):
        x = _tile(row_ptr, start, columns, V)
        weights = _weights(x, top, c)
        weights = tl.where((x >= least) & (weights >= min_p), weights, 0.0)
        sums = tl.where(tile == start // TILE, tl.sum(tl.sum(weights, axis=1), axis=0), sums)
    sums = sums.to(tl.float64)
    ends = tl.cumsum(sums, axis=0)
    uniform = tl.load(uniforms_ptr + b * uniforms_stride_b + i * uniforms_stride_t)
    if OF_ROWS[0]:  # the first of the likeliest; loaded again, because some registers spill where this is kept
        uniform = tl.where(tl.load(temperature_ptr + b) == 0, 0.0, uniform)
    target = uniform * tl.max(ends, axis=0)
    # Only where there is weight: a scan's sums may differ in their last bit where they should be equal.
    last = tl.max(tl.where(sums > 0, tile, 0), axis=0)
    chosen = tl.min(tl.where((ends > target) & (sums > 0), tile, last), axis=0)
    target -= tl.sum(tl.where(tile == chosen, ends - sums, 0.0), axis=0)

    x = _tile(row_ptr, chosen * TILE, columns, V)
    weights = _weights(x, top, c)
    weights = tl.where((x >= least) & (weights >= min_p), weights, 0.0).to(tl.float64)
    of_lanes = tl.sum(weights, axis=1)
    within = tl.cumsum(weights, axis=1) + (tl.cumsum(of_lanes, axis=0) - of_lanes)[:, None]
    last = tl.max(tl.max(tl.where(weights > 0, columns, 0), axis=1), axis=0)
    token = tl.min(tl.min(tl.where((within > target) & (weights > 0), columns, last), axis=1), axis=0)
    tl.store(tokens_ptr + position, (chosen * TILE + token).to(tl.int64))


def sample_from_logits(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    tokens: Tensor,
    valid: Tensor,
) -> None:
    """Write `tokens` and `valid`, (B,) or (B, T) contiguous, from logits (..., V) contiguous in V.

    A setting is a number or a tensor (B,).
    """
    settings = settings_for(logits.device)
    V, vector = logits.shape[-1], 16 // logits.element_size()
    has_tokens = logits.dim() == 3
    c = temperature if isinstance(temperature, Tensor) else log2_e() / temperature
    given = {"c": c, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    arguments = {
        "logits_ptr": logits,
        "uniforms_ptr": uniforms,
        "tokens_ptr": tokens,
        "valid_ptr": valid,
        "logits_stride_b": logits.stride(0),
        "logits_stride_t": logits.stride(1) if has_tokens else 0,
        "uniforms_stride_b": uniforms.stride(0),
        "uniforms_stride_t": uniforms.stride(1) if has_tokens else 0,
        "T": logits.shape[1] if has_tokens else 1,
        "V": V,
        **{name: x.contiguous() if isinstance(x, Tensor) else x for name, x in given.items()},
        "OF_ROWS": tuple(isinstance(x, Tensor) for x in given.values()),
        "HAS_TOP_K": isinstance(top_k, Tensor) or 0 < top_k < V,
        "HAS_TOP_P": isinstance(top_p, Tensor) or top_p < 1,
        "GRANULE": GRANULES[logits.dtype],
        "LANES": settings.lanes,
        "VECTOR": vector,
        "TILES_BLOCK": triton.next_power_of_2(-(-V // (settings.lanes * vector))),
    }
    with launched_on(logits.device):
        launch(sample_kernel, (uniforms.numel(),), arguments, num_warps=settings.num_warps)

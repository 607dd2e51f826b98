"""Parts of a pass over the vocabulary that keeps running maxima in each lane.

Logits are in units of log2, scaled by c = log2(e) / temperature, because the hardware's exponential is 2^x.
"""

import triton
import triton.language as tl

# Constants are functions, which are part of a kernel's hash: global ones Triton would compare again at each launch, for
# a third of the launch's time.


@triton.constexpr_function
def lowest():
    """Where maxima start: unlike -inf, minus itself it is 0."""
    return -3.4028234663852886e38


@triton.constexpr_function
def log2_e():
    return 1.4426950408889634


@triton.constexpr_function
def ln_2():
    return 0.6931471805599453


@triton.jit
def in_float32(x, FAST: tl.constexpr):
    """FAST: NVIDIA's own instructions, one for each of two bfloat16 of a register, of which Triton's take three."""
    if FAST and x.dtype == tl.bfloat16:
        halves: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(halves, "=f,=f,r", [x], tl.float32, is_pure=True, pack=2)
    return x.to(tl.float32)


@triton.jit
def weighted(w, x, GUARDED: tl.constexpr):
    """w * x; GUARDED: 0 and not NaN where w is 0 and x infinite. A weight that is NaN is != 0, and stays NaN."""
    if GUARDED:
        x = tl.where(w != 0, x, 0.0)
    return w * x


@triton.jit
def moved(f, total, shift, z):
    """A sum of terms w * x after x has grown by `shift` and w by the factor f; 0 where f is 0, even if it was inf."""
    return tl.where(f != 0, f * (total + shift * z), 0.0)


@triton.jit
def inverse_temperature(temperature_ptr, HAS_TEMPERATURE: tl.constexpr):
    """c = log2(e) / temperature."""
    temperature = tl.full([], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr).to(tl.float32)
    return log2_e() / temperature


@triton.jit
def tile_columns(GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """(GROUPS, LANES, VECTOR): the columns of a tile. A thread holds whole lanes."""
    group, lane, column = tl.arange(0, GROUPS), tl.arange(0, LANES), tl.arange(0, VECTOR)
    columns = group[:, None, None] * (LANES * VECTOR) + lane[None, :, None] * VECTOR + column[None, None, :]
    # For the lanes, which step by VECTOR, 2 is not true. But where axes tie in contiguity, Triton 3.6 spreads the
    # groups over the threads, which must then shuffle for each tile. The width of a load depends on the last axis only.
    return tl.max_contiguous(columns, [1, 2, VECTOR])


@triton.jit
def tile_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def tile_max(x):
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def scaled(top, c):
    """A maximum in units of log2, finite, because -inf minus itself would be NaN."""
    return tl.maximum(top * c, lowest())


@triton.jit
def log2(x, FAST: tl.constexpr):
    """FAST: NVIDIA's own instruction, within 2^-22 on [1/2, 2]; tl.log2 takes 35 instructions."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)

"""What the instructions compute that touch nothing but registers, by numpy on arrays of threads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray

TYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    **dict.fromkeys(("bf16",), np.dtype("u2")),
    **dict.fromkeys(("bf16x2", "f16x2"), np.dtype("u4")),
    "pred": np.dtype(bool),
}
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class Operation(NamedTuple):
    result: str  # types
    operands: tuple[str, ...]
    compute: Callable[..., Any]


def operation(name: str, kinds: tuple[str, ...]) -> Operation | None:
    """What an instruction computes, or None if it is none of arithmetic."""
    if name == "setp":
        return _compare(kinds)
    if name == "cvt":
        return _convert(kinds)
    if name not in FORMS:
        return None
    type_ = kinds[-1]
    result, operands, compute = FORMS[name](type_, set(kinds))
    if type_ in ("bf16", "bf16x2", "f16x2") and name != "selp":  # whose bits numpy takes for a whole number
        if type_ != "bf16" or name not in ("min", "max"):
            raise NotImplementedError(f"{name}.{'.'.join(kinds)}")
        compute = _of_bfloat16(compute)
    if "ftz" in kinds:
        compute = _without_subnormals(compute)
    return Operation(result, operands, compute)


def _of_bfloat16(compute: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands: to_bfloat16(compute(*map(from_bfloat16, operands)))


def _without_subnormals(compute: Callable[..., Any]) -> Callable[..., Any]:
    def flushed(*operands: Array) -> Array:
        return _flush(compute(*map(_flush, operands)))

    return flushed


def _flush(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _same(count: int, compute: Callable[..., Any]) -> Callable[[str, set[str]], Operation]:
    """All operands and the result of the type that is named."""
    return lambda type_, kinds: Operation(type_, (type_,) * count, compute)


def _multiply(type_: str, kinds: set[str]) -> Operation:
    if "wide" in kinds:
        return Operation(_wider(type_), (type_, type_), lambda a, b: _widen(a) * _widen(b))
    if "hi" in kinds:
        shift = TYPES[type_].itemsize * 8
        high = lambda a, b: ((_widen(a) * _widen(b)) >> np.array(shift, _widen(a).dtype)).astype(a.dtype)  # noqa: E731
        return Operation(type_, (type_, type_), high)
    return Operation(type_, (type_, type_), np.multiply)


def _multiply_add(type_: str, kinds: set[str]) -> Operation:
    if "wide" in kinds:
        return Operation(_wider(type_), (type_, type_, _wider(type_)), lambda a, b, c: _widen(a) * _widen(b) + c)
    return Operation(type_, (type_,) * 3, lambda a, b, c: a * b + c)


def _wider(type_: str) -> str:
    return type_[0] + str(2 * int(type_[1:]))


def _widen(x: Array) -> Array:
    if x.dtype.itemsize == 8:
        raise NotImplementedError("products of 128 bits")
    return x.astype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")


def _fused(type_: str, kinds: set[str]) -> Operation:
    """Rounded once: in the next wider format the product of two numbers is exact."""
    wide = {"f16": np.float32, "f32": np.float64, "f64": np.longdouble}[type_]
    narrow = TYPES[type_]
    return Operation(
        type_, (type_,) * 3, lambda a, b, c: (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(narrow)
    )


def _extremum(propagating: Any, ignoring: Any) -> Callable[[str, set[str]], Operation]:
    """Of a number and NaN the number, unless .NaN says otherwise."""
    return lambda type_, kinds: Operation(type_, (type_,) * 2, propagating if "NaN" in kinds else ignoring)


def _shift(left: bool) -> Callable[[str, set[str]], Operation]:
    def form(type_: str, kinds: set[str]) -> Operation:
        bits = TYPES[type_].itemsize * 8

        def compute(x: Array, by: Array) -> Array:
            by = np.minimum(by, bits)
            far, by = by == bits, np.minimum(by, bits - 1).astype(x.dtype)
            shifted = x << by if left else x >> by
            return np.where(far, np.zeros_like(x) if left or x.dtype.kind == "u" else x >> (bits - 1), shifted)

        return Operation(type_, (type_, "u32"), compute)

    return form


def _divide(remainder: bool) -> Callable[[str, set[str]], Operation]:
    def form(type_: str, kinds: set[str]) -> Operation:
        if type_.startswith("f"):
            return Operation(type_, (type_, type_), _near(np.true_divide) if "full" in kinds else np.true_divide)

        def compute(a: Array, b: Array) -> Array:
            if not b.all():
                raise ZeroDivisionError("whole numbers divided by 0")
            quotient = a // b
            if a.dtype.kind == "i":  # numpy rounds down, a GPU towards 0
                quotient += (quotient < 0) & (quotient * b != a)
            return a - quotient * b if remainder else quotient

        return Operation(type_, (type_, type_), compute)

    return form


def _bit_field(type_: str, kinds: set[str]) -> Operation:
    bits = TYPES[type_].itemsize * 8

    def compute(x: Array, first: Array, count: Array) -> Array:
        first, count = (y.astype(x.dtype) for y in (first, count))
        if (count == 0).any() or (first + count > bits).any():
            raise NotImplementedError("a bit field of no bits, or past the end")
        return x << (bits - first - count) >> (bits - count)

    return Operation(type_, (type_, "u32", "u32"), compute)


def _permute(type_: str, kinds: set[str]) -> Operation:
    def compute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
        for i in range(4):
            chosen = (selector >> np.uint32(4 * i)) & np.uint32(15)
            if (chosen > 7).any():
                raise NotImplementedError("prmt that repeats a sign")
            byte = (both >> (chosen.astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    return Operation("b32", ("b32", "b32", "u32"), compute)


def _not(type_: str, kinds: set[str]) -> Operation:
    return Operation(type_, (type_,), np.logical_not if type_ == "pred" else np.invert)


def _approximate(compute: Callable[..., Any]) -> Callable[[str, set[str]], Operation]:
    return lambda type_, kinds: Operation(type_, (type_,), _near(compute) if "approx" in kinds else compute)


def _near(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Off by -1 to 2 units in the last place, by a hash of the operands, where the result is not exact: what a GPU's
    special functions may do."""

    def off(*operands: Array) -> Array:
        exact = compute(*(x.astype(np.float64) for x in operands))
        result = np.array(exact.astype(np.float32))
        mixed = operands[0].view(np.uint32) * np.uint32(2654435761) >> np.uint32(30)
        moved = (result.view(np.int32) + mixed.astype(np.int32) - 1).view(np.float32)
        return np.where((result == exact) | ~np.isfinite(moved), result, moved)

    return off


def _near_log2(x: Array) -> Array:
    """Between 1/2 and 2 off by up to 2^-22, as NVIDIA documents it: near 1 nothing of the result need be right."""
    near = _near(np.log2)(x)
    moved = (
        near + (near.view(np.uint32) * np.uint32(2654435761) >> np.uint32(31)).astype(np.float32) * 2.0**-21 - 2.0**-22
    )
    return np.where((x >= 0.5) & (x <= 2), moved, near).astype(np.float32)


FORMS: dict[str, Callable[[str, set[str]], Operation]] = {
    "add": _same(2, np.add),
    "sub": _same(2, np.subtract),
    "and": _same(2, np.bitwise_and),
    "or": _same(2, np.bitwise_or),
    "xor": _same(2, np.bitwise_xor),
    "not": _not,
    "neg": _same(1, np.negative),
    "abs": _same(1, np.abs),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fused,
    "min": _extremum(np.minimum, np.fmin),
    "max": _extremum(np.maximum, np.fmax),
    "shl": _shift(left=True),
    "shr": _shift(left=False),
    "div": _divide(remainder=False),
    "rem": _divide(remainder=True),
    "bfe": _bit_field,
    "prmt": _permute,
    "popc": lambda type_, kinds: Operation("u32", (type_,), lambda x: np.bitwise_count(x).astype(np.uint32)),
    "ex2": _approximate(np.exp2),
    "lg2": lambda type_, kinds: Operation(type_, (type_,), _near_log2),
    "rcp": _approximate(np.reciprocal),
    "sqrt": _approximate(np.sqrt),
    "selp": lambda type_, kinds: Operation(type_, (type_, type_, "pred"), lambda a, b, p: np.where(p, a, b)),
}

COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def _compare(kinds: tuple[str, ...]) -> Operation:
    """Of numbers, one of which is NaN, "ltu" is true and "lt" is not; nor is "ne"."""
    relation, type_ = kinds[0], kinds[-1]
    decode = {"bf16": from_bfloat16, "bf16x2": _halves(from_bfloat16), "f16x2": _halves(lambda x: x.view("f2"))}
    decode = decode.get(type_, lambda x: x)
    is_float = "f" in type_

    def holds(a: Array, b: Array) -> Array:
        a, b = decode(a), decode(b)
        if not is_float:
            return COMPARISONS[relation.replace("lo", "lt").replace("hi", "gt").replace("ls", "le")](a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if relation in ("num", "nan"):
            return unordered if relation == "nan" else ~unordered
        if relation.endswith("u"):
            return COMPARISONS[relation[:-1]](a, b) | unordered
        return COMPARISONS[relation](a, b) & ~unordered

    if len(kinds) == 3:  # such as setp.lt.and.s32, which takes a third operand
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[kinds[1]]
        return Operation("pred", (type_, type_, "pred"), lambda a, b, p: combine(holds(a, b), p))
    return Operation("pred", (type_, type_), holds)


def _halves(decode: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The lower and the upper half of 32 bits, along a new first axis."""
    return lambda x: decode(np.stack([x.astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)]))


def from_bfloat16(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: Array) -> Array:
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _convert(kinds: tuple[str, ...]) -> Operation:
    target, source = kinds[-2:]
    if target in ("bf16x2", "f16x2"):  # the first operand becomes the upper half
        narrow = to_bfloat16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        pack = lambda a, b: narrow(a).astype(np.uint32) << np.uint32(16) | narrow(b)  # noqa: E731
        return Operation(target, (source, source), pack)
    if source == "bf16":
        return Operation(target, (source,), from_bfloat16)
    if target == "bf16":
        return Operation(target, (source,), to_bfloat16)
    to = TYPES[target]
    if source.startswith("f") and to.kind in "iu":
        if "rzi" not in kinds:
            raise NotImplementedError(f"cvt.{'.'.join(kinds)}")
        limits = np.iinfo(to)
        cut = lambda x: np.nan_to_num(np.clip(np.trunc(x), limits.min, limits.max), nan=0).astype(to)  # noqa: E731
        return Operation(target, (source,), cut)
    return Operation(target, (source,), lambda x: x.astype(to))

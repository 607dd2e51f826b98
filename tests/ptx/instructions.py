"""What instructions do. Each is read once a launch, its operands found and its types settled, and is then called."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.arithmetic import TYPES, UNSIGNED, Operation, from_bfloat16, operation
from ptx.memory import GpuError
from ptx.text import Instruction

if TYPE_CHECKING:
    from ptx.machine import Group, Machine

Array = np.ndarray
Step = Callable[["Machine", "Group"], None]  # an instruction, done

WARP = 32
BOOL = np.dtype(bool)


def step_of(instruction: Instruction, registers: dict[str, str]) -> Step:
    """`registers` by the prefix of their name, see `ptx.text.Kernel`."""
    return _Reader(instruction, registers).step()


class _Reader:
    """Makes an instruction a step: operands are found, types settled, once for all of a launch."""

    def __init__(self, instruction: Instruction, registers: dict[str, str]):
        self.instruction, self.registers = instruction, registers
        self.guard, self.negated = instruction.guard, instruction.negated

    def step(self) -> Step:
        name, kinds, operands = self.instruction.name, self.instruction.kinds, self.instruction.operands
        if computed := operation(name, kinds):
            return self.arithmetic(computed)
        return getattr(self, name)(kinds, operands)

    # Operands and results.

    def reader(self, operand: Any, type_: str) -> Callable[[Group], Array]:
        dtype = TYPES[type_]
        if isinstance(operand, tuple):  # parts of one register, the lowest first
            parts = [self.reader(part, f"b{dtype.itemsize * 8 // len(operand)}") for part in operand]

            def packed(group: Group) -> Array:
                result = np.zeros((1, 1), dtype)
                for i, part in enumerate(parts):
                    x = part(group)
                    result = result | (x.astype(dtype) << np.array(i * x.itemsize * 8, dtype))
                return result

            return packed
        if operand.startswith("%") and "." not in operand:

            def read_register(group: Group) -> Array:
                x = group.registers.get(operand)
                if x is None:
                    raise GpuError(f"{operand} is read before it is written")
                if dtype == BOOL or x.dtype == BOOL:
                    assert x.dtype == dtype
                    return x
                return (x if x.itemsize == dtype.itemsize else x.astype(UNSIGNED[dtype.itemsize])).view(dtype)

            return read_register
        if special := re.match(r"%(tid|ctaid|nctaid|ntid)\.([xyz])", operand):
            name, axis = special[1], "xyz".index(special[2])
            return lambda group: _special(group, name, axis).astype(dtype)
        constant = np.full((1, 1), _constant(operand, dtype))
        return lambda group: constant

    def writer(self, operand: Any) -> Callable[[Group, Array], None]:
        if isinstance(operand, tuple):
            writers = [None if part == "_" else self.writer(part) for part in operand]

            def unpack(group: Group, x: Array) -> None:
                bits = x.itemsize * 8 // len(operand)
                for i, write in enumerate(writers):
                    if write:
                        write(group, (x >> np.array(i * bits, x.dtype)).astype(f"u{bits // 8}"))

            return unpack
        match = re.match(r"%[a-z]+", operand)
        assert match, operand
        kind = TYPES[self.registers[match[0]]]
        own = kind if kind == BOOL else UNSIGNED[kind.itemsize]
        # What a register holds that was never written: NaN in each format.
        poison = np.full((1, 1), np.iinfo(own).max if own != BOOL else False, own)

        def write(group: Group, x: Array) -> None:
            x = np.asarray(x)
            if own != BOOL:
                x = x.view(UNSIGNED[x.itemsize]) if x.itemsize == own.itemsize else x.astype(own)
            mask = self.mask(group)
            if not mask.all():
                x = np.where(mask, x, group.registers.get(operand, poison))
            group.registers[operand] = x

        return write

    def mask(self, group: Group) -> Array:
        """The threads that are here and for which the guard holds."""
        return group.mask if self.guard is None else group.mask & (group.registers[self.guard] ^ self.negated)

    def active(self, group: Group) -> Array:
        """The same, (C * N,)."""
        return group.everywhere(self.mask(group))

    # Instructions, by their names.

    def arithmetic(self, computed: Operation) -> Step:
        result, *operands = self.instruction.operands
        readers = [self.reader(x, type_) for x, type_ in zip(operands, computed.operands, strict=True)]
        if isinstance(result, str) and "|" in result:  # two halves compared
            first, second = map(self.writer, result.split("|"))

            def compare(machine: Machine, group: Group) -> None:
                low, high = computed.compute(*(read(group) for read in readers))
                first(group, low)
                second(group, high)

            return compare
        write, compute = self.writer(result), computed.compute
        return lambda machine, group: write(group, compute(*(read(group) for read in readers)))

    def mov(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        write, type_ = self.writer(operands[0]), kinds[-1]
        read = self.reader("0" if operands[1] == "global_smem" else operands[1], type_)  # shared memory begins at 0
        return lambda machine, group: write(group, read(group))

    def cvta(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        return self.mov(kinds, operands)  # global addresses are generic ones

    def ld(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        space, element = kinds[0], TYPES[kinds[-1]]
        targets = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        writers, address = list(map(self.writer, targets)), operands[1]
        if space == "param":
            return lambda machine, group: writers[0](group, machine.arguments[address.base].view(element))

        def load(machine: Machine, group: Group) -> None:
            found = machine.load(group, address, element, len(writers), self.active(group), space == "shared")
            for write, x in zip(writers, found.T, strict=True):
                write(group, x.reshape(-1, group.threads))

        return load

    def st(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        space, address, type_ = kinds[0], operands[0], kinds[-1]
        sources = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        readers = [self.reader(x, type_) for x in sources]

        def store(machine: Machine, group: Group) -> None:
            values = np.stack([group.everywhere(read(group)) for read in readers], -1)
            machine.store(group, address, values, self.active(group), space == "shared")

        return store

    def cp(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        if kinds[:2] == ("async", "commit_group"):
            return lambda machine, group: machine.commit(group)
        if kinds[:2] == ("async", "wait_group"):
            return lambda machine, group: machine.wait(group, int(operands[0]))
        if kinds[0] != "async" or kinds[2:] != ("shared", "global"):
            raise NotImplementedError(self.instruction.text)
        to, source, width = *operands[:2], int(operands[2], 0)
        sizes = self.reader(operands[3] if len(operands) > 3 else str(width), "u32")
        return lambda machine, group: machine.copy(
            group, to, source, width, group.everywhere(sizes(group)), self.active(group)
        )

    def bar(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        if kinds == ("warp", "sync") and operands == ("-1",) and not self.guard:
            return lambda machine, group: None  # the threads of a warp go in lockstep, and do not race
        if kinds != ("sync",) or operands != ("0",) or self.guard:
            raise NotImplementedError(self.instruction.text)

        def barrier(machine: Machine, group: Group) -> None:
            group.epochs[group.whole_programs(group.mask)] += 1

        return barrier

    def shfl(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        write, lanes = self.writer(operands[0]), np.arange(WARP)
        read, by = self.reader(operands[1], "b32"), self.reader(operands[2], "u32")
        others: dict[str, Callable[[Array], Array]] = {
            "bfly": lambda y: lanes ^ y,
            "idx": lambda y: y % WARP,
            "up": lambda y: np.where(lanes < y, lanes, lanes - y),  # the first lanes keep their own
        }
        ends = ("0", "-1") if kinds[1] == "up" else ("31", "-1")
        if kinds[0] != "sync" or kinds[1] not in others or operands[3:] not in (ends, ("0x1f", "0xffffffff")):
            raise NotImplementedError(self.instruction.text)
        other = others[kinds[1]]

        def shuffle(machine: Machine, group: Group) -> None:
            x, y = (group.everywhere(f(group)).reshape(-1, WARP) for f in (read, by))
            write(group, np.take_along_axis(x, other(y).astype(np.int64), 1).reshape(-1, group.threads))

        return shuffle

    def redux(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        write, read = self.writer(operands[0]), self.reader(operands[1], kinds[-1])
        reduce = {"min": np.min, "max": np.max, "add": np.sum}[kinds[1]]

        def reduced(machine: Machine, group: Group) -> None:
            x = group.everywhere(read(group)).reshape(-1, WARP)
            result = np.repeat(reduce(x, 1, keepdims=True).astype(x.dtype), WARP, 1)
            write(group, result.reshape(-1, group.threads))

        return reduced

    def ldmatrix(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        """x1, x2, x4 matrices of 8 rows of 16 bytes, whose addresses are those of 8 threads each; of each a thread
        gets two neighbouring elements of a row, or of a column."""
        writers, address, lanes = list(map(self.writer, operands[0])), operands[1], np.arange(WARP)
        count = len(writers)

        def load(machine: Machine, group: Group) -> None:
            gives = self.active(group) & np.tile(lanes < 8 * count, len(group.ids) * group.threads // WARP)
            rows = machine.load(group, address, np.dtype("u2"), 8, gives, is_shared=True)
            matrices = rows.reshape(-1, 4, 8, 8)[:, :count]
            if "trans" in kinds:
                matrices = matrices.swapaxes(-1, -2)
            pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)
            for i, write in enumerate(writers):
                write(group, pairs[:, i].reshape(-1, group.threads))

        return load

    def mma(self, kinds: tuple[str, ...], operands: tuple) -> Step:
        """m16n8k16 of 16 bits, summed in float32."""
        if kinds[2:6] != ("m16n8k16", "row", "col", "f32") or kinds[6] not in ("f16", "bf16"):
            raise NotImplementedError(self.instruction.text)
        writers = list(map(self.writer, operands[0]))
        types = ("b32", "b32", "f32")
        readers = [[self.reader(x, type_) for x in xs] for xs, type_ in zip(operands[1:], types, strict=True)]

        def numbers(x: Array) -> Array:
            halves = np.ascontiguousarray(x).view(np.uint16)
            return from_bfloat16(halves) if kinds[6] == "bf16" else halves.view(np.float16).astype(np.float32)

        def multiply(machine: Machine, group: Group) -> None:
            a, b, c = ([group.everywhere(read(group)).reshape(-1, 8, 4) for read in xs] for xs in readers)
            # Lane (g, t) holds of a its rows g and g + 8, columns 2 t, 2 t + 1 and 8 on; of b the same of column g; of
            # the result rows g and g + 8, columns 2 t and 2 t + 1.
            a, b = ([numbers(x) for x in xs] for xs in (a, b))
            left, right = np.empty((len(a[0]), 16, 16)), np.empty((len(a[0]), 8, 16))
            left[:, :8, :8], left[:, 8:, :8], left[:, :8, 8:], left[:, 8:, 8:] = a
            right[..., :8], right[..., 8:] = b
            product = left @ right.swapaxes(1, 2)
            for i, write in enumerate(writers):
                rows = product[:, 8 * (i // 2) :][:, :8, i % 2 :: 2]
                write(group, (rows + c[i]).astype(np.float32).reshape(-1, group.threads))

        return multiply


def _special(group: Group, name: str, axis: int) -> Array:
    if name == "tid":
        return np.arange(group.threads)[None] if axis == 0 else np.zeros((1, 1), int)
    if name == "ctaid":
        return group.ids[:, axis : axis + 1]
    if name == "nctaid":
        return np.full((1, 1), group.grid[axis])
    raise NotImplementedError(f"%{name}")


def _constant(text: str, dtype: np.dtype) -> Any:
    if dtype == BOOL:
        return text not in ("0", "false")
    bits = int(text[2:], 16) if re.match(r"0[fFdD][0-9A-F]+$", text) else int(text, 0)  # a float is given by its bits
    return np.array(bits & ((1 << dtype.itemsize * 8) - 1), UNSIGNED[dtype.itemsize]).view(dtype)

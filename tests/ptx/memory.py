"""What the programs of a launch read and write: tensors, each program's shared memory, and who touched what when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

Array = np.ndarray


class GpuError(Exception):
    """An access that on a GPU is an error or undefined behaviour."""


class Access(NamedTuple):
    """One instruction of many threads: bytes `at` to `at + width` of each. Arrays of one length."""

    at: Array
    width: int
    program: Array  # its place in the grid, counted through
    warp: Array
    epoch: Array  # how many barriers the program had passed
    writes: bool


@dataclass
class Region:
    """A stretch of memory, of which some bytes may be touched."""

    data: Array  # uint8
    allowed: Array | None = None  # bool, a byte each; None: all
    accesses: list[Access] = field(default_factory=list)

    def check(self, offsets: Array, width: int) -> None:
        if (offsets % width).any():
            raise GpuError(f"access of {width} bytes at an address that is not divisible by that")
        inside = (offsets >= 0) & (offsets + width <= len(self.data))
        if self.allowed is not None and inside.all():
            inside = self.allowed[offsets] & self.allowed[offsets + width - 1]
        if not inside.all():
            raise GpuError(f"{np.count_nonzero(~inside)} accesses of {width} bytes outside of the launch's tensors")

    def read(self, offsets: Array, width: int, element: np.dtype) -> Array:
        """(n, width / itemsize) elements."""
        whole = self.data[: len(self.data) // element.itemsize * element.itemsize].view(element)
        return whole[offsets[:, None] // element.itemsize + np.arange(width // element.itemsize)]

    def write(self, offsets: Array, values: Array) -> None:
        """(n, count) elements."""
        size = values.dtype.itemsize
        whole = self.data[: len(self.data) // size * size].view(values.dtype)
        whole[offsets[:, None] // size + np.arange(values.shape[1])] = values

    def refuse_races(self, name: str) -> None:
        """Two programs touched a byte that one of them wrote; or two warps of one did with no barrier between, but for
        those that write it by one instruction, as the holders of copies do, and may read it again."""
        if not any(access.writes for access in self.accesses):
            return
        unit = int(np.gcd.reduce([access.width for access in self.accesses]))
        touched = _Touched(self.accesses, unit)
        starts, ends = touched.runs("at")
        parted = touched.field("program", starts) != touched.field("program", ends)
        bad = starts[parted & np.logical_or.reduceat(touched.field("writes"), starts)]
        if len(bad):
            byte = touched.field("at", bad[0]) * unit
            raise GpuError(f"race in {name}: two programs touched byte {byte}, and one of them wrote it")
        starts, ends = touched.runs("epoch")
        several = touched.field("warp", starts) != touched.field("warp", ends)
        unclear = several & np.logical_or.reduceat(touched.field("writes"), starts)
        if not unclear.any():
            return
        touched.numbers = touched.numbers[unclear.repeat(ends - starts + 1)]
        starts, _ = touched.runs("epoch")
        number, writes = touched.field("number"), touched.field("writes") == 1
        by_warp = np.int64(1) << touched.field("warp")  # sets of warps
        writers = np.bitwise_or.reduceat(np.where(writes, by_warp, 0), starts)
        readers = np.bitwise_or.reduceat(np.where(writes, 0, by_warp), starts)
        first = np.minimum.reduceat(np.where(writes, number, len(self.accesses)), starts)
        last = np.maximum.reduceat(np.where(writes, number, -1), starts)
        bad = starts[((writers & (writers - 1) != 0) & (first != last)) | (readers & ~writers != 0)]
        if len(bad):
            byte = touched.field("at", bad[0]) * unit
            raise GpuError(f"race in {name}: two warps touched byte {byte} without a barrier between, and one wrote it")


class _Touched:
    """Each unit that a thread touched, its fields packed into one number, in order: numbers sort many times as fast as
    rows of a table."""

    FIELDS = ("at", "program", "epoch", "warp", "number", "writes")  # the highest bits first

    def __init__(self, accesses: Sequence[Access], unit: int):
        columns = [access._asdict() | {"number": i} for i, access in enumerate(accesses)]
        self.shifts, self.bits, shift = {}, {}, 0
        for name in reversed(self.FIELDS):
            greatest = max(int(np.max(column[name], initial=0)) for column in columns)
            self.shifts[name], self.bits[name] = shift, greatest.bit_length()
            shift += greatest.bit_length()
        assert shift < 64
        self.numbers = np.concatenate([self._packed(column, unit) for column in columns])
        self.numbers.sort()

    def _packed(self, column: dict[str, Any], unit: int) -> Array:
        rest = sum(column[name] << self.shifts[name] for name in self.FIELDS[1:])
        at = column["at"][:, None] // unit + np.arange(column["width"] // unit)
        return (at << self.shifts["at"] | rest[:, None]).ravel()

    def field(self, name: str, places: Any = ...) -> Array:
        return self.numbers[places] >> self.shifts[name] & (1 << self.bits[name]) - 1

    def runs(self, name: str) -> tuple[Array, Array]:
        """The first and the last of those that agree in this field and all before it."""
        x = self.numbers >> self.shifts[name]
        changes = np.flatnonzero(x[1:] != x[:-1])
        return np.append(0, changes + 1), np.append(changes, len(x) - 1)


def allow(x: torch.Tensor, allowed: Array) -> None:
    """Set `allowed`, a bool for each byte of the tensor's storage, where its elements lie."""
    item = x.element_size()
    sizes = [size if stride else min(size, 1) for size, stride in zip(x.shape, x.stride(), strict=True)]
    strides = [stride * item for stride in x.stride()]
    torch.from_numpy(allowed).as_strided((*sizes, item), (*strides, 1), x.storage_offset() * item).fill_(True)


class GlobalMemory:
    """The storages of a launch's tensors, by their addresses. Of a view only its own elements may be touched."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self.regions: dict[int, Region] = {}
        for x in tensors:
            storage = x.untyped_storage()
            if not storage.nbytes():
                continue
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            region = self.regions.setdefault(storage.data_ptr(), Region(data, np.zeros(len(data), bool)))
            allow(x, region.allowed)

    def parts(self, addresses: Array, width: int) -> Iterator[tuple[Region, Array, Array]]:
        """Of (n,) addresses: each region that they are in, which of them, and their offsets."""
        left = np.ones(len(addresses), bool)
        for start, region in self.regions.items():
            inside = (addresses >= start) & (addresses < start + len(region.data))
            if inside.any():
                left &= ~inside
                offsets = (addresses[inside] - np.uint64(start)).astype(np.int64)
                if (addresses[inside] % np.uint64(width)).any():
                    raise GpuError(f"access of {width} bytes at an address that is not divisible by that")
                region.check(offsets, width)
                yield region, inside, offsets
        if left.any():
            raise GpuError(f"{np.count_nonzero(left)} accesses of {width} bytes outside of the launch's tensors")

    def refuse_races(self) -> None:
        for number, region in enumerate(self.regions.values()):
            region.refuse_races(f"memory of tensor {number}")

"""Runs a kernel: registers of many programs' threads side by side, in lockstep, as long as they go the same way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ptx.instructions import WARP, Step, step_of
from ptx.memory import Access, GlobalMemory, GpuError, Region
from ptx.text import Address, Instruction, Kernel

Array = np.ndarray

TOGETHER = 16384  # threads that go in lockstep, about
WIDEST = 16  # bytes of an access
POISON = 0xFF  # every byte of fresh shared memory: NaN in each format


class Group:
    """Programs side by side: C of them, of N threads each. Registers and masks have the shape (C, N), or 1 in place of
    either. Of threads that part ways those go on that are furthest behind, until all are together again."""

    def __init__(self, ids: Array, grid: tuple[int, ...], threads: int, shared: int):
        self.ids, self.grid, self.threads = ids, grid, threads  # (C, 3) places in the grid
        self.registers: dict[str, Array] = {}
        self.shared = Region(np.full(len(ids) * shared, POISON, np.uint8))
        self.place = 0  # in the code, of the threads that go on
        self.mask = np.ones((len(ids), 1), bool)  # which they are
        self.elsewhere: dict[int, Array] = {}  # the masks of others, by their place
        self.running = self.mask  # those that have not returned
        self.epochs = np.zeros(len(ids), int)  # barriers that each program has passed
        self.committed = np.zeros(len(ids), int)  # groups of copies that each has begun
        self.copies: list[Copy] = []  # that have not arrived

    def everywhere(self, x: Array) -> Array:
        """(C * N,)"""
        shape = (len(self.ids), self.threads)
        return (x if x.shape == shape else np.broadcast_to(x, shape)).ravel()

    def whole_programs(self, mask: Array) -> Array:
        """(C,) of which programs all threads are in a mask; raises where only some are."""
        inside = np.broadcast_to(mask, (len(self.ids), self.threads))
        running = np.broadcast_to(self.running, inside.shape)
        result = inside.any(1)
        if (inside != running)[result].any():
            raise GpuError("a barrier, or what acts as one, that not all threads of a program reach")
        return result

    def go(self, place: int, mask: Array) -> None:
        """Let the threads of a mask be at a place."""
        if mask.any():
            here = self.elsewhere.get(place)
            self.elsewhere[place] = compact(mask if here is None else mask | here)

    def choose(self) -> bool:
        """Go on with those that are furthest behind; whether there are any."""
        if not self.elsewhere:
            return False
        self.place = min(self.elsewhere)
        self.mask = self.elsewhere.pop(self.place)
        return True


def compact(mask: Array) -> Array:
    """(C, 1) where the threads of a program agree."""
    return mask[:, :1] if mask.shape[1] > 1 and (mask == mask[:, :1]).all() else mask


class Copy(NamedTuple):
    """One cp.async of many threads: arrays of one length, and the bytes that are to come."""

    offsets: Array
    values: Array
    program: Array  # place in the group
    number: Array  # of the program's commit group


class Machine:
    """One launch of a kernel."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        arguments: dict[str, Array],  # (1, 1) each, by the parameter's name
        grid: tuple[int, ...],
        threads: int,  # of a program
        shared: int,  # bytes of a program's shared memory
    ):
        self.kernel, self.memory, self.arguments = kernel, memory, arguments
        self.grid, self.threads, self.shared = grid, threads, shared
        self.steps: list[Step | None] = [None] * len(kernel.code)

    def run(self, seed: int = 0) -> None:
        ids = np.stack(np.meshgrid(*map(np.arange, self.grid), indexing="ij"), -1).reshape(-1, 3)
        np.random.default_rng(seed).shuffle(ids)
        with np.errstate(all="ignore"):
            for part in np.array_split(ids, -(-len(ids) * self.threads // TOGETHER)):
                self._run(Group(part, self.grid, self.threads, self.shared))
        self.memory.refuse_races()

    def _run(self, group: Group) -> None:
        code = self.kernel.code
        while True:
            if group.elsewhere and min(group.elsewhere) <= group.place:
                group.go(group.place, group.mask)
                group.choose()
            instruction = code[group.place]
            if instruction.name in ("bra", "ret"):
                if self._leave(group, instruction):
                    break
                continue
            step = self.steps[group.place]
            try:
                if step is None:
                    step = self.steps[group.place] = step_of(instruction, self.kernel.registers)
                step(self, group)
            except Exception as error:
                error.add_note(f"in: {instruction.text}")
                raise
            group.place += 1
        if group.copies:
            raise GpuError("a program ended before its copies")
        group.shared.refuse_races("shared memory")

    def _leave(self, group: Group, instruction: Instruction) -> bool:
        """A branch or a return; whether all threads have returned."""
        leaving = group.mask
        if instruction.guard is not None:
            leaving = leaving & (group.registers[instruction.guard] ^ instruction.negated)
            group.go(group.place + 1, group.mask & ~leaving)
        if instruction.name == "bra":
            group.go(self.kernel.labels[instruction.operands[0]], leaving)
        else:
            group.running = group.running & ~leaving
        return not group.choose()

    # What touches memory.

    def addresses(self, group: Group, address: Address, is_shared: bool) -> Array:
        """(C * N,) uint64 addresses, or int64 offsets into the group's shared memory."""
        if address.base in group.registers:
            base = group.registers[address.base].astype(np.int64)
        elif address.base == "global_smem":
            base = np.zeros((1, 1), np.int64)
        else:
            raise NotImplementedError(f"address {address}")
        base = group.everywhere(base + address.offset)
        if not is_shared:
            return base.view(np.uint64)
        own = np.repeat(np.arange(len(group.ids)) * self.shared, self.threads)
        return np.where((base >= 0) & (base < self.shared), base + own, -WIDEST)  # of no other program

    def parts(
        self, group: Group, addresses: Array, width: int, active: Array, is_shared: bool, writes: bool
    ) -> Iterator[tuple[Region, Array, Array]]:
        """Each region that active threads touch: which they are, and their offsets; noted and checked."""
        if is_shared:
            group.shared.check(addresses[active], width)
            found = iter([(group.shared, np.ones(np.count_nonzero(active), bool), addresses[active])])
        else:
            found = self.memory.parts(addresses[active], width)
        threads = np.flatnonzero(active)
        for region, which, offsets in found:
            mine = threads[which]
            place = mine // self.threads
            program, epochs = np.ravel_multi_index(group.ids.T, self.grid)[place], group.epochs[place]
            warp = mine % self.threads // WARP
            region.accesses.append(Access(offsets, width, program, warp, epochs, writes))
            yield region, mine, offsets

    def load(
        self, group: Group, address: Address, element: np.dtype, count: int, active: Array, is_shared: bool
    ) -> Array:
        """(C * N, count) elements, 0 where a thread is not active."""
        width = element.itemsize * count
        result = np.zeros((len(group.ids) * self.threads, count), element)
        addresses = self.addresses(group, address, is_shared)
        for region, threads, offsets in self.parts(group, addresses, width, active, is_shared, writes=False):
            result[threads] = region.read(offsets, width, element)
        return result

    def store(self, group: Group, address: Address, values: Array, active: Array, is_shared: bool) -> None:
        """(C * N, count) elements."""
        width = values.dtype.itemsize * values.shape[1]
        addresses = self.addresses(group, address, is_shared)
        for region, threads, offsets in self.parts(group, addresses, width, active, is_shared, writes=True):
            region.write(offsets, values[threads])

    def copy(self, group: Group, to: Address, source: Address, width: int, sizes: Array, active: Array) -> None:
        """cp.async: begun now, there when it is waited for; what is beyond a thread's size is 0."""
        if (active & (sizes != width) & (sizes != 0)).any():
            raise NotImplementedError("cp.async of a part")
        values = self.load(group, source, np.dtype("u1"), width, active & (sizes == width), is_shared=False)
        addresses = self.addresses(group, to, is_shared=True)
        for region, threads, offsets in self.parts(group, addresses, width, active, is_shared=True, writes=True):
            region.write(offsets, np.full((len(offsets), width), POISON, np.uint8))  # anything, until then
            program = threads // self.threads
            group.copies.append(Copy(offsets, values[threads], program, group.committed[program]))

    def commit(self, group: Group) -> None:
        group.committed[group.whole_programs(group.mask)] += 1

    def wait(self, group: Group, open_groups: int) -> None:
        """For all groups of copies but the last few."""
        waits = group.whole_programs(group.mask)
        left = []
        for copy in group.copies:
            due = waits[copy.program] & (copy.number < group.committed[copy.program] - open_groups)
            group.shared.write(copy.offsets[due], copy.values[due])
            if not due.all():
                left.append(Copy(*(x[~due] for x in copy)))
        group.copies = left

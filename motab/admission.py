"""Which trajectories are in progress: rows are given to those that wait, and taken back where the caches are full."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from motab import memory
from motab.row import Row
from motab.writer import Writer


class Admission:
    """The rows of a run, and the trajectories that wait for one, by index.

    Args:
        indices: of the trajectories; they begin in this order.
        new_row: begins the trajectory of an index.
        writers: whose caches the rows are kept in.
        judged: what the device knows of each row's turn in progress, a slot each; goes and comes with its row.
        block_size: the most that a writer appends to a row in one round.
        max_length: of a row.

    Attributes:
        rows: one a slot of the caches; None is free.
        parked: of those that wait, the ones that have been begun, and their part of `judged`.
    """

    def __init__(
        self,
        indices: Iterable[int],
        new_row: Callable[[int], Row],
        writers: Sequence[Writer],
        judged: Sequence[Tensor],
        *,
        batch_size: int,
        block_size: int,
        max_length: int,
    ):
        self.new_row, self.writers, self.judged = new_row, writers, judged
        self.block_size, self.max_length = block_size, max_length
        self.rows: list[Row | None] = [None] * batch_size
        self.waiting = sorted(indices)  # a heap
        self.parked: dict[int, tuple[Row, list[Tensor]]] = {}

    def busy(self) -> list[tuple[int, Row]]:
        """The rows in progress and their slots."""
        return [(slot, row) for slot, row in enumerate(self.rows) if row is not None]

    def admit(self) -> list[int]:
        """Give free rows to the first that wait, as long as there is room in the caches; the slots of those that
        begin."""
        self._make_room()
        texts: dict[int, list[int]] = {}
        fresh: list[int] = []
        for slot, place in enumerate(self.rows):
            if place is not None or not self.waiting:
                continue
            index = self.waiting[0]
            row = self.parked[index][0] if index in self.parked else self.new_row(index)
            if not self._has_room({slot: row.length}, spare=memory.page_size(self.max_length)):
                break
            heapq.heappop(self.waiting)
            self.rows[slot] = row
            texts[slot] = row.text
            if index not in self.parked:
                fresh.append(slot)
                continue
            for x, part in zip(self.judged, self.parked.pop(index)[1], strict=True):
                x[slot] = part
        for writer in self.writers:
            writer.reserve(self._room_needed())
            if texts:
                writer.start(texts)
        return fresh

    def finished(self) -> list[Row]:
        """The rows of which nothing more is to be written; their slots are free then."""
        found = [(slot, row) for slot, row in self.busy() if row.finished]
        for slot, _ in found:
            self.rows[slot] = None
        return [row for _, row in found]

    def _make_room(self) -> None:
        """Where the caches do not hold what the coming round may write, the rows that have least wait, and are read
        again when there is room."""
        while not self._has_room():
            slot, row = min(self.busy(), key=lambda pair: (len(pair[1].records), -pair[1].index))
            self.parked[row.index] = row, [x[slot].clone() for x in self.judged]
            heapq.heappush(self.waiting, row.index)
            self.rows[slot] = None

    def _has_room(self, fresh: dict[int, int] | None = None, spare: int = 0) -> bool:
        return all(writer.has_room(self._room_needed(fresh, spare)) for writer in self.writers)

    def _room_needed(self, fresh: dict[int, int] | None = None, spare: int = 0) -> dict[int, int]:
        """Slots of each row, and of fresh ones of these lengths, for a round in which both models write a block at
        most, and to spare. One row always has them."""
        lengths = {slot: row.length for slot, row in self.busy()} | (fresh or {})
        return {slot: min(length + 2 * self.block_size + spare, self.max_length) for slot, length in lengths.items()}

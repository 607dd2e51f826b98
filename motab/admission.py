"""Which trajectories are in progress: waiting ones get free rows, and give them back when the caches are full."""

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
        indices: indices of the trajectories, which begin in this order.
        new_row: makes the row of a trajectory from its index.
        writers: the models whose caches hold the rows.
        judged: device state of each row's turn in progress, one slot per row; saved and restored with the row.
        block_size: the most tokens that a writer appends to a row in one round.
        max_length: the most tokens that a row may hold.

    Attributes:
        rows: one per slot of the caches; None: free.
        parked: waiting trajectories that have already begun, with their part of `judged`.
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

    def has_more(self) -> bool:
        """Whether any trajectory waits or is in progress."""
        return bool(self.waiting or self.busy())

    def busy(self) -> list[tuple[int, Row]]:
        """The rows in progress and their slots."""
        return [(slot, row) for slot, row in enumerate(self.rows) if row is not None]

    def admit(self) -> list[int]:
        """Give free rows to the first waiting trajectories while the caches have room; return the slots of new ones."""
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
        """Remove and return the finished rows; their slots become free."""
        found = [(slot, row) for slot, row in self.busy() if row.finished]
        for slot, _ in found:
            self.rows[slot] = None
        return [row for _, row in found]

    def _make_room(self) -> None:
        """While the caches cannot hold what the coming round may write, park the row with the fewest tokens; it is read
        again when there is room."""
        while not self._has_room():
            slot, row = min(self.busy(), key=lambda pair: (len(pair[1].seen), -pair[1].index))
            self.parked[row.index] = row, [x[slot].clone() for x in self.judged]
            heapq.heappush(self.waiting, row.index)
            self.rows[slot] = None

    def _has_room(self, fresh: dict[int, int] | None = None, spare: int = 0) -> bool:
        return all(writer.has_room(self._room_needed(fresh, spare)) for writer in self.writers)

    def _room_needed(self, fresh: dict[int, int] | None = None, spare: int = 0) -> dict[int, int]:
        """Cache slots that each row, and fresh ones of these lengths, need for a round in which both models write at
        most a block, plus `spare`. A single row always fits."""
        lengths = {slot: row.length for slot, row in self.busy()} | (fresh or {})
        return {slot: min(length + 2 * self.block_size + spare, self.max_length) for slot, length in lengths.items()}

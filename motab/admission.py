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
        judged: device state of the turns in progress, by row of the caches; saved and restored with the row.
        block_size: the most tokens that a writer appends to a row in one round.
        max_length: the most tokens that a row may hold.

    Attributes:
        rows: those in progress, by row of the caches; None: free.
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

    def busy(self) -> list[Row]:
        """The rows in progress."""
        return [row for row in self.rows if row is not None]

    def admit(self) -> list[Row]:
        """Give free rows of the caches to the first waiting trajectories while there is room; return the new ones."""
        self._make_room()
        texts: dict[int, list[int]] = {}
        fresh: list[Row] = []
        for cache_row, occupant in enumerate(self.rows):
            if occupant is not None or not self.waiting:
                continue
            index = self.waiting[0]
            row = self.parked[index][0] if index in self.parked else self.new_row(index)
            row.cache_row = cache_row
            if not self._has_room([*self.busy(), row], spare=memory.page_size(self.max_length)):
                break
            heapq.heappop(self.waiting)
            self.rows[cache_row] = row
            texts[cache_row] = row.text
            if index not in self.parked:
                fresh.append(row)
                continue
            for x, part in zip(self.judged, self.parked.pop(index)[1], strict=True):
                x[cache_row] = part
        for writer in self.writers:
            writer.reserve(self._room_needed(self.busy()))
            if texts:
                writer.start(texts)
        return fresh

    def finished(self) -> list[Row]:
        """Remove and return the finished rows."""
        found = [row for row in self.busy() if row.finished]
        for row in found:
            self.rows[row.cache_row] = None
        return found

    def _make_room(self) -> None:
        """While the caches cannot hold what the coming round may write, park the row with the fewest tokens; it is read
        again when there is room."""
        while not self._has_room(self.busy()):
            row = min(self.busy(), key=lambda row: (len(row.seen), -row.index))
            self.parked[row.index] = row, [x[row.cache_row].clone() for x in self.judged]
            heapq.heappush(self.waiting, row.index)
            self.rows[row.cache_row] = None

    def _has_room(self, rows: list[Row], spare: int = 0) -> bool:
        return all(writer.has_room(self._room_needed(rows, spare)) for writer in self.writers)

    def _room_needed(self, rows: list[Row], spare: int = 0) -> dict[int, int]:
        """Cache slots that each of these rows needs for a round in which both models write at most a block, plus
        `spare`. A single row always fits."""
        more = 2 * self.block_size + spare
        return {row.cache_row: min(row.length + more, self.max_length) for row in rows}

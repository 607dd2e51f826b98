"""The file of a synthesis, read line by line: what is whole, what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from motab.trajectory import Trajectory


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """The trajectories of a finished or interrupted file; a last line cut short is left out.

    Raises:
        ValueError: a line that is no trajectory; names it and the way out.
    """
    return list(trajectories_in(path))


def trajectories_in(path: str | Path) -> Iterator[Trajectory]:
    """The same one by one, so that no more than one is in memory."""
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                trajectory = Trajectory.from_json(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"line {number} of {path} must hold one whole trajectory, got {error}; run the motab synthesize "
                    "that wrote the file again, which writes it anew, or remove the line"
                ) from error
            yield trajectory


def whole_index(line: bytes) -> int | None:
    """The index of the trajectory that a line holds; None of one that is damaged or cut short."""
    if not line.endswith(b"\n"):
        return None
    try:
        return Trajectory.from_json(line.decode("utf-8")).index
    except ValueError:
        return None

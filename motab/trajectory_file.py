"""The file of a synthesis, read line by line: what is whole, what is damaged, what is still to come."""

from __future__ import annotations

import json
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


def settings_file(path: str | Path) -> Path:
    """Beside the file of a synthesis: the settings that it was begun with, and how many prompts there are."""
    return Path(path).with_name(Path(path).name + ".settings.json")


def unfinished(path: str | Path) -> str | None:
    """What is still to come of a file, and the way on; None where it is finished, or nothing beside it tells."""
    written, cut = 0, False
    with Path(path).open("rb") as lines:
        for line in lines:
            cut = not line.endswith(b"\n")
            written += not cut
    beside = settings_file(path)
    total = json.loads(beside.read_text(encoding="utf-8"))["prompts"] if beside.exists() else None
    if cut or (total is not None and written < total):
        of_all = "trajectories and a line cut short" if total is None else f"of {total} trajectories"
        return f"{path} holds {written} {of_all}, unfinished: run the same motab synthesize again, which goes on"
    return None


def whole_index(line: bytes) -> int | None:
    """The index of the trajectory that a line holds; None of one that is damaged or cut short."""
    if not line.endswith(b"\n"):
        return None
    try:
        return Trajectory.from_json(line.decode("utf-8")).index
    except ValueError:
        return None

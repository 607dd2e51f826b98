"""The file of a synthesis, read line by line: its whole, damaged and missing trajectories."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from motab.files import whole_file, whole_path
from motab.judgement import agrees
from motab.trajectory import Grade, Trajectory

_STATISTICS = b',"statistics":{'


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """The trajectories of a finished or interrupted file; an incomplete last line is left out.

    Raises:
        ValueError: a line that is not a trajectory; names it and what to do.
    """
    return list(trajectories_in(path))


def check_trajectories(path: str | Path) -> int:
    """Check that the file is whole and consistent, and return how many trajectories it holds.

    Raises:
        ValueError: the file is damaged, empty or unfinished; an index is out of order, tokens and authors differ in
            number, or a step was judged against its value and boundary.
    """
    missing, seen, count, last = unfinished(path), set[int](), 0, -1
    whole = settings_file(path).exists()  # a synthesis, that of a trajectory for each prompt
    for place, t in enumerate(some_trajectories_in(path)):
        breach = next((at for at, step in enumerate(t.steps) if not step.accepted), None)
        wrong = [
            at for at, s in enumerate(t.steps) if t.score and not agrees(t.score, s.value, s.threshold, s.accepted)
        ]
        # An unfinished file has its trajectories as they were finished, of several processes the main one's; the file
        # of a step of training has those of one process.
        misplaced = t.index in seen if missing else t.index != place if whole else t.index <= last
        problems = [
            (misplaced, f"has index {t.index}"),
            (len(t.author) != len(t.token_ids), f"has {len(t.token_ids)} tokens and {len(t.author)} authors"),
            (bool(wrong), f"judges step {wrong and wrong[0]} against its value and boundary"),
            (t.breach_step != breach, f"has breach_step {t.breach_step} where step {breach} is the first to breach"),
        ]
        if found := [text for bad, text in problems if bad]:
            raise ValueError(f"trajectory {place} {' and '.join(found)}")
        seen.add(t.index)
        count, last = count + 1, t.index
    if missing:
        raise ValueError(missing)
    return count


def trajectories_in(
    path: str | Path, *, statistics: bool = True, first: int = 0, end: int | None = None
) -> Iterator[Trajectory]:
    """Yield the trajectories of a file, or those on lines ``first`` to ``end``, without holding them all in memory.

    Args:
        statistics: False leaves them out, which reads five times as fast.
    """
    with Path(path).open("rb") as lines:
        for number, line in enumerate(islice(lines, first, end), first + 1):
            if not line.endswith(b"\n"):
                return
            try:
                trajectory = Trajectory.from_json((line if statistics else _without_statistics(line)).decode("utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"line {number} of {path} must hold one whole trajectory, got {error}; rerun the motab "
                    "synthesize that wrote the file, which rewrites the line, or remove the line; of a dataset with "
                    "solutions motab import makes such a file, and train --dataset_name takes one with problems"
                ) from error
            if not statistics:
                trajectory.statistics = {}
            yield trajectory


def some_trajectories_in(path: str | Path, *, statistics: bool = True) -> Iterator[Trajectory]:
    """`trajectories_in` of a file that must hold at least one.

    Raises:
        ValueError: the file holds none, or what `trajectories_in` refuses.
    """
    trajectories = trajectories_in(path, statistics=statistics)
    if (first := next(trajectories, None)) is None:
        raise ValueError(f"{path} holds no trajectory yet")
    return chain([first], trajectories)


def _without_statistics(line: bytes) -> bytes:
    """A line of `Trajectory.to_json` with empty statistics: most of it, which takes most of the time to parse."""
    start = line.rfind(_STATISTICS)  # a text that contains this has backslashes before the quotes
    end = line.find(b"}", start)
    return line if start < 0 or end < 0 else line[: start + len(_STATISTICS)] + line[end:]


def settings_file(path: str | Path) -> Path:
    """The file beside that of a synthesis, with the settings it was begun with and the number of prompts."""
    return Path(path).with_name(Path(path).name + ".settings.json")


def unfinished(path: str | Path) -> str | None:
    """How many trajectories of a file are missing, and how to write them; None if it is finished, or its settings are
    not known."""
    written, cut = 0, False
    with Path(path).open("rb") as lines:
        for line in lines:
            cut = not line.endswith(b"\n")
            written += not cut
    beside = settings_file(path)
    total = json.loads(beside.read_text(encoding="utf-8"))["prompts"] if beside.exists() else None
    if cut or (total is not None and written < total):
        of_all = "trajectories and a line cut short" if total is None else f"of {total} trajectories"
        return f"{path} holds {written} {of_all}, unfinished: run the same motab synthesize again to continue"
    return None


def whole_trajectory(line: bytes) -> Trajectory | None:
    """The trajectory on a line; None if the line is damaged or incomplete."""
    if not line.endswith(b"\n"):
        return None
    try:
        return Trajectory.from_json(line.decode("utf-8"))
    except ValueError:
        return None


def grade_rest(path: str | Path, grade: Grade) -> None:
    """Grade those trajectories of a file that are not."""
    if all(trajectory.correct is not None for trajectory in trajectories_in(path, statistics=False)):
        return
    with whole_file(path) as graded:
        for trajectory in trajectories_in(path):
            if trajectory.correct is None:
                trajectory.correct = bool(grade(trajectory, trajectory.index))
            graded.write(trajectory.to_json() + "\n")


def cut_from(path: str | Path, index: int) -> None:
    """Drop the trajectories of this index and above, and damaged lines; the file is made if it is not there."""
    path = Path(path)
    with whole_path(path) as unfinished_path, unfinished_path.open("wb") as kept:
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    found = whole_trajectory(line)
                    if found is not None and found.index < index:
                        kept.write(line)

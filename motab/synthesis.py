"""`synthesize` into a JSONL file, by one process or several: an interrupted run goes on where it stopped and ends with
the same file."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motab.engine import synthesize
from motab.files import whole_file, write_whole
from motab.policies import MotabPolicy, Policy
from motab.processes import Processes
from motab.prompts import Prompt
from motab.trajectory import Trajectory

GROUP_BATCHES = 16


def synthesize_to_file(
    path: str | Path,
    student: PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    policy: Policy | None = None,
    batch_size: int = 8,
    **settings: Any,
) -> Iterator[Trajectory]:
    """Write each trajectory of `synthesize` as a line of ``path`` and yield it.

    Prompts run in groups of 16 batches. A run that finds the file of an interrupted one keeps its whole lines,
    writes the group in which it stopped again, and yields what was not there yet: so the rows of every batch are the
    ones that they would have been, and the file ends the same to the last bit of its statistics.

    Of several processes (`accelerate launch`, torchrun) each calls this, with models on its own device. It takes whole
    groups, each into a file of its own in ``path.parts``, and yields its own trajectories; when all have finished, the
    main process appends the groups to ``path``. So every process must exhaust its iterator, also where that yields
    nothing: the others wait for it at the end. The file is that of one process, and the run can be gone on with by
    another number of them.

    A model that the processes share (tensor parallelism: `DistributedConfig(tp_plan="auto")` of transformers) runs when
    all of them call it. They then write every trajectory together, on GPUs of one kind, so that each samples the same
    token; the main process keeps the file and yields all, the others nothing.

    Args:
        path: the file, where every process sees it; ``path.settings.json`` beside it holds the settings it was begun
            with.
        settings: as for `synthesize`.

    Raises:
        ValueError: all that `synthesize` refuses, and a file that was begun with other settings or prompts; nothing
            is written then.
    """
    path = Path(path)
    policy = MotabPolicy() if policy is None else policy
    options: dict[str, Any] = {"policy": policy, "batch_size": batch_size, **settings}
    synthesize(student, teacher, tokenizer, prompts, **options)  # refuses bad input before a file is made
    begun = {
        "policy": type(policy).__name__,
        **asdict(policy),
        "prompts": len(prompts),
        "student": None if student is None else student.name_or_path,
        "teacher": None if teacher is None else teacher.name_or_path,
        "batch_size": batch_size,
        **settings,
    }
    size = batch_size * GROUP_BATCHES
    groups = range(0, len(prompts), size)
    processes = Processes()
    shared = any((model.tp_size or 1) > 1 for model in (student, teacher) if model is not None)
    if processes.index == 0 and not shared and processes.count > len(groups):
        warnings.warn(
            f"expected a group of {size} prompts (16 batches) for each of {processes.count} processes, got "
            f"{len(prompts)} prompts, so that some processes write nothing; lower batch_size",
            stacklevel=2,
        )
    written, missing = processes.from_main(lambda: _begin(path, begun, groups))

    def write(first: int) -> Iterator[Trajectory]:
        return synthesize(student, teacher, tokenizer, prompts[first : first + size], first_index=first, **options)

    return _write(path, groups, written, missing, write, processes, shared)


def share_of_main(prompts: int, batch_size: int, processes: int) -> int:
    """How many of the prompts the main process writes on, where nothing is written yet."""
    size = batch_size * GROUP_BATCHES
    return sum(min(size, prompts - first) for first in range(0, prompts, size * processes))


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """The trajectories of a finished or interrupted file; a last line cut short is left out."""
    with Path(path).open("rb") as lines:
        return [Trajectory.from_json(line.decode("utf-8")) for line in lines if line.endswith(b"\n")]


def _write(
    path: Path,
    groups: range,
    written: int,
    missing: Sequence[int],
    write: Callable[[int], Iterator[Trajectory]],
    processes: Processes,
    shared: bool,
) -> Iterator[Trajectory]:
    if processes.count > 1 and not shared:
        for first in missing[processes.index :: processes.count]:
            with whole_file(_part(path, first)) as part:
                for trajectory in write(first):
                    part.write(trajectory.to_json() + "\n")
                    if trajectory.index >= written:
                        yield trajectory
        processes.wait()
    if processes.index == 0:
        yield from _append(path, groups, written, write)
    elif shared:
        for first in missing:
            for _ in write(first):
                pass
    processes.wait()


def _append(
    path: Path, groups: range, written: int, write: Callable[[int], Iterator[Trajectory]]
) -> Iterator[Trajectory]:
    """Bring the file to its end, with the groups that have a file of their own and by writing the others."""
    with path.open("a", encoding="utf-8") as file:
        for first in groups[written // groups.step :]:
            part = _part(path, first)
            if part.exists():
                with part.open(encoding="utf-8") as lines:
                    file.writelines(islice(lines, max(written - first, 0), None))
                file.flush()
                part.unlink()
                continue
            for trajectory in write(first):
                if trajectory.index >= written:
                    file.write(trajectory.to_json() + "\n")
                    file.flush()
                    yield trajectory
    shutil.rmtree(_parts(path), ignore_errors=True)


def _parts(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def _part(path: Path, first: int) -> Path:
    return _parts(path) / f"{first}.jsonl"


def _begin(path: Path, begun: dict[str, Any], groups: range) -> tuple[int, list[int]]:
    """Begin a file, or refuse to go on with it; how many lines it holds, and which groups are still to be written."""
    beside = path.with_name(path.name + ".settings.json")
    begun = json.loads(json.dumps(begun))
    if path.exists():
        before = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        other = [name for name in sorted({*before, *begun}) if before.get(name) != begun.get(name)]
        if other:
            raise ValueError(
                f"{path} was begun with other settings ("
                + ", ".join(f"{name}: {before.get(name)!r} there, {begun.get(name)!r} now" for name in other)
                + "); give another path, or remove it to start anew"
            )
    else:
        shutil.rmtree(_parts(path), ignore_errors=True)  # of a file that was removed to start anew
        write_whole(beside, json.dumps(begun, indent=1))
        path.touch()
    written = _whole_lines(path)
    return written, [first for first in groups[written // groups.step :] if not _part(path, first).exists()]


def _whole_lines(path: Path) -> int:
    """How many lines the file holds, after a last one that was cut short has been taken off."""
    count = end = 0
    with path.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        file.truncate(end)
    return count

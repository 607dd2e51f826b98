"""`synthesize` into a JSONL file, so that an interrupted run goes on where it stopped and ends with the same file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motab.engine import Prompt, synthesize
from motab.files import write_whole
from motab.policies import MotabPolicy, Policy
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

    Args:
        path: the file; ``path.settings.json`` beside it holds the settings it was begun with.
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
    _same_run(path, begun)
    return _write(path, student, teacher, tokenizer, prompts, batch_size * GROUP_BATCHES, options)


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """The trajectories of a finished or interrupted file; a last line cut short is left out."""
    with Path(path).open("rb") as lines:
        return [Trajectory.from_json(line.decode("utf-8")) for line in lines if line.endswith(b"\n")]


def _write(
    path: Path,
    student: PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    group_size: int,
    options: dict[str, Any],
) -> Iterator[Trajectory]:
    written = _whole_lines(path)
    with path.open("a", encoding="utf-8") as file:
        for first in range(written // group_size * group_size, len(prompts), group_size):
            group = prompts[first : first + group_size]
            for trajectory in synthesize(student, teacher, tokenizer, group, first_index=first, **options):
                if trajectory.index >= written:
                    file.write(trajectory.to_json() + "\n")
                    file.flush()
                    yield trajectory


def _whole_lines(path: Path) -> int:
    """How many lines the file holds, after a last one that was cut short has been taken off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)
    return content.count(b"\n")


def _same_run(path: Path, begun: dict[str, Any]) -> None:
    """Note what the file is made with, or refuse it where it was begun with something else."""
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
        return
    write_whole(beside, json.dumps(begun, indent=1))

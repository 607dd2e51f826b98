"""`synthesize` into a JSONL file, by one process or several; an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motab.files import whole_path, write_whole
from motab.fingerprint import differences, hash_of_prompts, hash_of_weights, policy_settings
from motab.generation import PACE, SETTINGS, synthesize
from motab.lock import Lock
from motab.models import processes_sharing
from motab.policies import MotabPolicy, Policy, needs_student
from motab.processes import Processes
from motab.prompts import Prompt, encode_prompts
from motab.quantization import method
from motab.trajectory import Grade, Trajectory
from motab.trajectory_file import grade_rest, settings_file, whole_trajectory


def synthesize_to_file(
    path: str | Path,
    student: PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    policy: Policy | None = None,
    grade: Grade | None = None,
    **settings: Any,
) -> Iterator[Trajectory]:
    """Write each trajectory of `synthesize` as a line of ``path`` as soon as it is finished, and yield it; at the end
    the file is in the order of the prompts.

    If ``path`` is the file of an interrupted run, its whole lines are kept; missing and damaged trajectories are
    written and yielded. They are the ones that the other run would have written, except through rounding of a model's
    logits in another batch. So a file can also be continued with more prompts after those it was begun with.

    With several processes (`accelerate launch`, torchrun), each calls this with models on its own device. Of n
    processes, each writes every n-th trajectory to its own file in ``path.parts`` (the main process to ``path``) and
    yields it. When all have finished, the main process merges the files into ``path``, in order. Every process must
    exhaust its iterator: the others wait for it at the end. Another number of processes can continue the run.

    A model that the processes share (tensor parallelism: `DistributedConfig(tp_plan="auto")` of transformers) runs only
    when all of them call it. They then write every trajectory together, on GPUs of one kind, so that all sample the
    same tokens; the main process writes the file and yields every trajectory, the others yield nothing.

    Args:
        path: the file, visible to every process; ``path.settings.json`` beside it holds the settings it was begun with.
        grade: says whether a trajectory answers its problem, given the place of its prompt in ``prompts``; kept as its
            ``correct``, see `motab.grade`. Trajectories that the file holds already without a grade are graded too;
            grades that it holds are kept.
        settings: as for `synthesize`.

    Raises:
        ValueError: whatever `synthesize` refuses, a file that another run is writing, and one that was begun with other
            prompts, weights or settings; ``batch_size``, ``block_size``, ``torch_compile`` and ``max_cached_tokens``
            may change, and so may the student under `TeacherOnly`. Nothing is written then.
    """
    path = Path(path)
    policy = MotabPolicy() if policy is None else policy
    if "in_order" in settings:
        raise ValueError("synthesize_to_file yields trajectories as they are finished, and takes no in_order")
    options: dict[str, Any] = {"policy": policy, **settings, "in_order": False}  # what is finished is to be kept
    encoded = encode_prompts(prompts, tokenizer)
    synthesize(student, teacher, tokenizer, encoded, **options)  # refuses bad input before a file is made
    # A student that writes nothing changes no trajectory: it may come and go.
    models = {"student": student if needs_student(policy) else None, "teacher": teacher}
    begun = {
        **policy_settings(policy),
        **{name: hash_of_weights(model) for name, model in models.items()},
        **{f"{name} dtype": None if model is None else str(model.dtype) for name, model in models.items()},
        **{f"{name} quantized by": None if model is None else method(model) for name, model in models.items()},
        "prompts": len(prompts),
        "prompts' hash": hash_of_prompts(encoded),
        **{name: value for name, value in {**SETTINGS, **settings}.items() if name not in PACE},
    }
    processes = Processes()
    shared = any(processes_sharing(model) > 1 for model in (student, teacher) if model is not None)
    locks: list[Lock] = []

    def begin() -> list[int]:
        locks.append(Lock(path))  # the main process's, for all
        try:
            return _begin(path, begun, encoded, grade)
        except BaseException:
            locks.pop().release()
            raise

    missing = processes.from_main(begin)
    if not shared:
        missing = missing[processes.index :: processes.count]
    here = synthesize(student, teacher, tokenizer, [encoded[i] for i in missing], indices=missing, **options)
    return _locked(locks, _write(path, here, grade, processes, shared))


def _locked(locks: list[Lock], trajectories: Iterator[Trajectory]) -> Iterator[Trajectory]:
    try:
        yield from trajectories
    finally:
        for lock in locks:
            lock.release()


def _write(
    path: Path, here: Iterator[Trajectory], grade: Grade | None, processes: Processes, shared: bool
) -> Iterator[Trajectory]:
    if processes.index > 0 and shared:
        for _ in here:
            pass
    else:
        part = path if processes.index == 0 else _parts(path) / f"{processes.index}.jsonl"
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a", encoding="utf-8") as file:
            for trajectory in here:
                trajectory.correct = None if grade is None else bool(grade(trajectory, trajectory.index))
                file.write(trajectory.to_json() + "\n")
                file.flush()
                yield trajectory
    processes.wait()
    if processes.index == 0:
        _bring_in_order(path)
    processes.wait()


def _begin(path: Path, begun: dict[str, Any], prompts: list[list[int]], grade: Grade | None) -> list[int]:
    """Begin a file or continue it; return the indices of the missing trajectories."""
    beside = settings_file(path)
    begun = json.loads(json.dumps(begun, default=float))  # NumPy's numbers
    if path.exists():
        before = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        there = before.get("prompts", 0)
        grown = there < len(prompts) and before.get("prompts' hash") == hash_of_prompts(prompts[:there])
        if grown:  # a trajectory depends on its place, not on the prompts after it
            before |= {name: begun[name] for name in ("prompts", "prompts' hash")}
        if different := differences(before, begun):
            raise ValueError(
                f"{path} was begun with other settings ({different}); give another path, or remove it to start again"
            )
        if grown:
            write_whole(beside, json.dumps(begun, indent=1))
    else:
        shutil.rmtree(_parts(path), ignore_errors=True)  # left by a file that was removed to start again
        write_whole(beside, json.dumps(begun, indent=1))
        path.touch()
    written = _bring_in_order(path)
    if grade is not None:
        grade_rest(path, grade)
    return [index for index in range(len(prompts)) if index not in written]


class _Line(NamedTuple):
    path: Path
    begin: int
    length: int


def _bring_in_order(path: Path) -> set[int]:
    """Merge the whole lines of the file and of its parts into the file, by index; return their indices."""
    lines: dict[int, _Line] = {}
    damaged: list[str] = []
    files = [path, *sorted(_parts(path).glob("*.jsonl"))]
    for file in files:
        begin = 0
        with file.open("rb") as content:
            for number, line in enumerate(content, 1):
                if (trajectory := whole_trajectory(line)) is not None:
                    lines[trajectory.index] = _Line(file, begin, len(line))
                elif line.endswith(b"\n"):
                    damaged.append(f"{number} of {file}")
                begin += len(line)
    if damaged:
        warnings.warn(
            f"{len(damaged)} line(s) hold no whole trajectory, the first is line {damaged[0]}; the missing ones are "
            "written again",
            stacklevel=2,
        )
    own = [index for index, line in lines.items() if line.path == path]
    size = sum(lines[index].length for index in own)
    if len(files) > 1 or size != path.stat().st_size or any(a > b for a, b in pairwise(own)):
        with whole_path(path) as temporary, temporary.open("wb") as out:
            _copy([lines[index] for index in sorted(lines)], out)
        shutil.rmtree(_parts(path), ignore_errors=True)
    return set(lines)


def _copy(lines: list[_Line], out: BinaryIO) -> None:
    contents = {path: path.open("rb") for path in {line.path for line in lines}}
    try:
        for line in lines:
            contents[line.path].seek(line.begin)
            out.write(contents[line.path].read(line.length))
    finally:
        for content in contents.values():
            content.close()


def _parts(path: Path) -> Path:
    return path.with_name(path.name + ".parts")

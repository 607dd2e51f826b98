"""Accuracy of a model on problems with answers: the mean over samples with its standard error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motab.data import Problem
from motab.files import write_whole
from motab.generation import synthesize
from motab.grading import check_answers, grade
from motab.policies import OnPolicy
from motab.processes import Processes
from motab.prompts import PromptFormat
from motab.synthesis import synthesize_to_file
from motab.trajectory import Trajectory
from motab.trajectory_file import settings_file, trajectories_in


@dataclass(frozen=True)
class Evaluation:
    """How well a model answers.

    Attributes:
        accuracy: share of right answers, the mean over problems of the mean over their samples.
        standard_error: of `accuracy`, from the spread between problems.
        overlong: share of answers that ran out of budget.
        num_problems, num_samples: how many problems, and how many answers to each.
        correct: for each problem its share of right answers.
        pass_at_k: share of problems with at least one right answer among their k = `num_samples`; equal to `accuracy`
            for one sample.
    """

    accuracy: float
    standard_error: float
    overlong: float
    num_problems: int
    num_samples: int
    correct: tuple[float, ...]
    pass_at_k: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ± {self.standard_error:.3f}"


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    num_samples: int = 1,
    temperature: float = 0.6,
    prompt_format: PromptFormat = PromptFormat(),  # noqa: B008 (it is frozen)
    answers_file: str | Path | None = None,
    watch: Callable[[Iterable[Trajectory], int], Iterable[Trajectory]] | None = None,
    **settings: Any,
) -> Evaluation:
    """Let a model answer problems and verify the answers.

    With several processes (`accelerate launch`, torchrun), each calls this with the model on its own device, answers
    its share of the problems and returns the result for all.

    Args:
        num_samples: answers to each problem.
        temperature: 0 is greedy.
        prompt_format: how the problems are put to the model.
        answers_file: JSONL file to which the main process writes every answer at the end, in order:
            ``index`` of the problem, ``sample``, ``text``, ``correct``, ``finish_reason``, ``tokens`` (their number).
            Until then answers are kept in ``answers_file.unfinished``, as by `synthesize_to_file`: an evaluation that
            is interrupted resumes when it is started again.
        watch: called with the trajectories that this process writes, as they come, and their number; returns them, as
            `motab.progress.watch` does.
        settings: as for `motab.synthesize`: ``max_new_tokens``, ``batch_size``, ``top_p``, ``seed`` ...

    Raises:
        ValueError: no problems, problems without answers, several samples at temperature 0 (identical answers), an
            unfinished file of another evaluation; all before generation.
    """
    if not problems:
        raise ValueError("evaluate needs at least one problem, got none")
    check_answers(problems)
    if num_samples < 1 or (num_samples > 1 and temperature == 0):
        raise ValueError(
            f"num_samples must be 1 at temperature 0, and at least 1 above, got {num_samples} at {temperature}"
        )
    prompts = [prompt_format.render(tokenizer, problem) for problem in problems for _ in range(num_samples)]
    options: dict[str, Any] = {"policy": OnPolicy(), "temperature": temperature, **settings}
    processes = Processes()
    place = processes.from_main(lambda: None if answers_file is None else str(answers_file))
    first, end = (
        num_samples * (len(problems) * index // processes.count) for index in (processes.index, processes.index + 1)
    )
    if place is None:
        texts: Iterable[Trajectory] = synthesize(model, None, tokenizer, prompts, **options)
        missing = end - first
        if processes.count > 1:  # every process has checked all prompts
            texts = synthesize(model, None, tokenizer, prompts[first:end], indices=range(first, end), **options)
    else:
        begun = Path(f"{place}.unfinished")
        texts = synthesize_to_file(begun, model, None, tokenizer, prompts, **options)
        with begun.open("rb") as there:
            missing = -(-(len(prompts) - sum(1 for _ in there)) // processes.count)
    if watch is not None:
        texts = watch(texts, missing)
    keep_text = place is not None
    if place is not None:
        for _ in texts:
            pass
        texts = trajectories_in(begun, statistics=False, first=first, end=end)
    graded = [_graded(trajectory, problems, num_samples, tokenizer, keep_text) for trajectory in texts]
    answers = [answer for part in processes.gather(graded) for answer in part]
    if place is not None:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        processes.from_main(lambda: _finish(Path(place), begun, lines))
    return _summary(answers, len(problems), num_samples)


def _finish(path: Path, begun: Path, lines: str) -> None:
    write_whole(path, lines)
    begun.unlink()
    settings_file(begun).unlink()


def _graded(
    trajectory: Trajectory,
    problems: Sequence[Problem],
    num_samples: int,
    tokenizer: PreTrainedTokenizerBase,
    keep_text: bool,
) -> dict[str, Any]:
    """One answer as a line of ``answers_file`` holds it."""
    index, sample = divmod(trajectory.index, num_samples)
    return {
        "index": index,
        "sample": sample,
        "text": trajectory.text if keep_text else None,
        "correct": grade(trajectory, problems[index], tokenizer),
        "finish_reason": trajectory.finish_reason,
        "tokens": len(trajectory.token_ids),
    }


def _summary(answers: Sequence[Mapping[str, Any]], problems: int, num_samples: int) -> Evaluation:
    right = [0] * problems
    for answer in answers:
        right[answer["index"]] += answer["correct"]
    shares = [count / num_samples for count in right]
    mean = sum(shares) / problems
    spread = sum((share - mean) ** 2 for share in shares) / max(problems - 1, 1)
    return Evaluation(
        accuracy=mean,
        standard_error=math.sqrt(spread / problems),
        overlong=sum(answer["finish_reason"] == "length" for answer in answers) / len(answers),
        num_problems=problems,
        num_samples=num_samples,
        correct=tuple(shares),
        pass_at_k=sum(count > 0 for count in right) / problems,
    )

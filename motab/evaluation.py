"""Accuracy of a model on problems with verifiable answers: the mean over samples with its standard error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motab.data import ANSWER_COLUMNS, Problem
from motab.engine import synthesize
from motab.files import write_whole
from motab.policies import OnPolicy
from motab.processes import Processes
from motab.prompts import PromptFormat
from motab.synthesis import synthesize_to_file
from motab.trajectory import Trajectory
from motab.trajectory_file import settings_file, trajectories_in

# Where a text without a box states its answer, best first; the last match of each counts.
_STATED = (
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),
    re.compile(r"answer is:?\s*(.+?)\.?\s*$", re.IGNORECASE | re.MULTILINE),
)


@dataclass(frozen=True)
class Evaluation:
    """How well a model answers.

    Attributes:
        accuracy: share of right answers, the mean over problems of the mean over their samples.
        standard_error: of `accuracy`, from the spread between problems.
        overlong: share of answers that ran out of budget.
        problems, samples: how many problems, and how many answers to each.
        correct: for each problem its share of right answers.
        pass_at_k: share of problems with at least one right answer among their k = `samples`; equal to `accuracy` for
            one sample.
    """

    accuracy: float
    standard_error: float
    overlong: float
    problems: int
    samples: int
    correct: tuple[float, ...]
    pass_at_k: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ± {self.standard_error:.3f}"


def stated_answer(text: str) -> str | None:
    """The answer that a text states: its last ``\\boxed{}``, else ``<answer>``, else "answer is ..."; None if there is
    none."""
    if (boxed := _last_boxed(text)) is not None:
        return boxed.strip()
    for place in _STATED:
        if found := place.findall(text):
            return str(found[-1]).strip()
    return None


def _last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{}`` that is closed holds, braces within it included."""
    for box in reversed([*re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for brace in re.finditer(r"\\[{}]|[{}]", text[box.end() :]):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)  # an escaped one is text
            if depth == 0:
                return text[box.end() : box.end() + brace.start()]
    return None


def after_thinking(text: str) -> str | None:
    """The text after the last ``</think>``, or all of it without one; None if a ``<think>`` was not closed."""
    rest = text.rpartition("</think>")[2]
    return None if "<think>" in rest else rest


def check_answers(problems: Sequence[Problem]) -> None:
    """Refuse problems without an answer to compare with.

    Raises:
        ValueError: names the row of the first, and how many there are.
    """
    if lacking := [row for row, problem in enumerate(problems) if problem.answer is None]:
        raise ValueError(
            f"grading needs an answer to each problem, a text in a column {' or '.join(ANSWER_COLUMNS)}, got none in "
            f"row {lacking[0]} and in {len(lacking)} of {len(problems)} rows in total; leave them out, or give another "
            "answer_column"
        )


def is_correct(text: str, problem: Problem, *, finish_reason: str = "eos", thinking: bool = False) -> bool:
    """Whether a text answers a problem: by the task's own verifier for reasoning-gym, else by math-verify.

    Only text after the thinking counts; if the thinking was not closed, nothing does. A text is right if its stated
    answer is (`stated_answer`) or, unless it was cut off, what math-verify finds in the whole of it: the set of all
    boxes, or the last number.

    Args:
        finish_reason: for ``"length"``, a text that ran out of budget, only the stated answer counts: the last number
            of a truncated text is no answer.
        thinking: the prompt ended with ``<think>``, so the text begins inside the thinking.

    Raises:
        ValueError: the problem has no answer to compare with.
    """
    if problem.answer is None:
        raise ValueError(f"is_correct needs a problem with an answer to compare with, got {problem!r}")
    answer = after_thinking("<think>" + text if thinking else text)
    if answer is None:
        return False
    stated = stated_answer(answer)
    metadata = problem.record.get("metadata")
    task = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if task is not None:
        import reasoning_gym

        return bool(reasoning_gym.get_score_answer_fn(task)(stated, problem.record) == 1.0)
    import math_verify

    gold = math_verify.parse(problem.answer if "\\boxed" in problem.answer else f"\\boxed{{{problem.answer}}}")
    answers = [] if stated is None else [f"\\boxed{{{stated.strip('* ')}}}"]
    answers += [] if finish_reason == "length" else [answer]
    return any(math_verify.verify(gold, math_verify.parse(each)) for each in answers)


def grade(trajectory: Trajectory, problem: Problem, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a trajectory answers the problem that its prompt puts, see `is_correct`."""
    thinking = tokenizer.decode(trajectory.prompt_ids).rstrip().endswith("<think>")
    return is_correct(trajectory.text, problem, finish_reason=trajectory.finish_reason, thinking=thinking)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    samples: int = 1,
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
        samples: answers to each problem.
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
    if samples < 1 or (samples > 1 and temperature == 0):
        raise ValueError(f"samples must be 1 at temperature 0, and at least 1 above, got {samples} at {temperature}")
    prompts = [prompt_format.render(tokenizer, problem) for problem in problems for _ in range(samples)]
    options: dict[str, Any] = {"policy": OnPolicy(), "temperature": temperature, **settings}
    processes = Processes()
    place = processes.from_main(lambda: None if answers_file is None else str(answers_file))
    first, end = (
        samples * (len(problems) * index // processes.count) for index in (processes.index, processes.index + 1)
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
    graded = [_graded(trajectory, problems, samples, tokenizer, keep_text) for trajectory in texts]
    answers = [answer for part in processes.gather(graded) for answer in part]
    if place is not None:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        processes.from_main(lambda: _finish(Path(place), begun, lines))
    return _summary(answers, len(problems), samples)


def _finish(path: Path, begun: Path, lines: str) -> None:
    write_whole(path, lines)
    begun.unlink()
    settings_file(begun).unlink()


def _graded(
    trajectory: Trajectory,
    problems: Sequence[Problem],
    samples: int,
    tokenizer: PreTrainedTokenizerBase,
    keep_text: bool,
) -> dict[str, Any]:
    """One answer as a line of ``answers_file`` holds it."""
    index, sample = divmod(trajectory.index, samples)
    return {
        "index": index,
        "sample": sample,
        "text": trajectory.text if keep_text else None,
        "correct": grade(trajectory, problems[index], tokenizer),
        "finish_reason": trajectory.finish_reason,
        "tokens": len(trajectory.token_ids),
    }


def _summary(answers: Sequence[Mapping[str, Any]], problems: int, samples: int) -> Evaluation:
    right = [0] * problems
    for answer in answers:
        right[answer["index"]] += answer["correct"]
    shares = [count / samples for count in right]
    mean = sum(shares) / problems
    spread = sum((share - mean) ** 2 for share in shares) / max(problems - 1, 1)
    return Evaluation(
        accuracy=mean,
        standard_error=math.sqrt(spread / problems),
        overlong=sum(answer["finish_reason"] == "length" for answer in answers) / len(answers),
        problems=problems,
        samples=samples,
        correct=tuple(shares),
        pass_at_k=sum(count > 0 for count in right) / problems,
    )

"""Whether a text answers a problem."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from motab.data import ANSWER_COLUMNS, Problem
from motab.trajectory import Trajectory

_SECONDS = 5  # for a verifier, as math-verify gives itself
_LONGEST = 1000  # characters of a stated answer; longer ones are of a text that repeats itself, and take long to parse


def stated_answer(text: str) -> str | None:
    """The answer that a text states: its last ``\\boxed{}``, else ``<answer>``, else "answer is ..."; None if there is
    none."""
    if (boxed := _last_boxed(text)) is not None:
        return boxed.strip()
    _, opened, answer = text.rpartition("</answer>")[0].rpartition("<answer>")
    if opened:
        return answer.partition("</answer>")[0].strip()
    found = re.findall(r"answer is:?\s*([^\n]+)", text, re.IGNORECASE)
    return found[-1].rstrip().removesuffix(".").strip() if found else None


def _last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{}`` that is closed holds, braces within it included."""
    last = None
    opened: list[int | None] = []  # where each open box begins, None for a bare brace
    for found in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):  # an escaped brace is text
        if found[0] == "{":
            opened.append(None)
        elif found[0].startswith("\\boxed"):
            opened.append(found.end())
        elif found[0] == "}" and opened:
            begin = opened.pop()
            if begin is not None and (last is None or begin > last.start):
                last = slice(begin, found.start())
    return None if last is None else text[last]


def after_thinking(text: str) -> str | None:
    """The text after the last ``</think>``, or all of it without one; None if a ``<think>`` was not closed."""
    rest = text.rpartition("</think>")[2]
    return None if "<think>" in rest else rest


def _letters(answer: str) -> str | None:
    """A text of at least two letters and nothing else but spaces and markup, casefolded; None if it is another."""
    boxed = _last_boxed(answer)
    bare = re.sub(r"\\(?:text|math)[a-z]*\s*{([^{}]*)}", r"\1", answer if boxed is None else boxed)
    letters = "".join(bare.strip("$*. ").split()).casefold()
    return letters if len(letters) > 1 and letters.isalpha() else None


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
    boxes, or the last number. Where the right answer and the stated one are letters alone, two or more, as "ACB" and
    "Yes" are, they are compared as text, in any case: math-verify takes letters for a product, which equals that of any
    anagram. So "ba" does not answer "ab"; "b \\cdot a" does.

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
        return _passes(task, stated, problem.record)
    words = [_letters(each) for each in (problem.answer, stated or "")]
    if None not in words:
        return words[0] == words[1]
    import math_verify

    gold = math_verify.parse(problem.answer if "\\boxed" in problem.answer else f"\\boxed{{{problem.answer}}}")
    answers = [] if stated is None or len(stated) > _LONGEST else [f"\\boxed{{{stated.strip('* ')}}}"]
    answers += [] if finish_reason == "length" else [answer]
    return any(math_verify.verify(gold, math_verify.parse(each)) for each in answers)


def _passes(task: str, stated: str | None, record: Mapping[str, Any]) -> bool:
    """Whether a reasoning-gym task's own verifier accepts an answer. Some evaluate it as Python or raise if it has
    another form: what names Python's internals, takes long or raises is wrong."""
    import reasoning_gym
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    score = reasoning_gym.get_score_answer_fn(task)
    if stated is not None and (len(stated) > _LONGEST or "__" in stated):
        return False
    if threading.current_thread() is threading.main_thread():  # which alone gets a signal
        score = timeout(_SECONDS)(score)
    try:
        return bool(score(stated, dict(record)) == 1.0)
    except (Exception, TimeoutException):
        return False


def grade(trajectory: Trajectory, problem: Problem, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a trajectory answers the problem that its prompt puts, see `is_correct`.

    As ``grade=`` of `motab.synthesize_to_file` and `motab.Rollouts`::

        lambda trajectory, place: motab.grade(trajectory, problems[place], tokenizer)
    """
    thinking = tokenizer.decode(trajectory.prompt_ids).rstrip().endswith("<think>")
    return is_correct(trajectory.text, problem, finish_reason=trajectory.finish_reason, thinking=thinking)

"""Problems from a hub dataset, a local file or a procedural task, whatever their columns are called."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from yaml import YAMLError

from motab.yaml_values import load_yaml

QUESTION_COLUMNS = ("question", "problem", "instruction", "input", "prompt", "messages", "conversations")
ANSWER_COLUMNS = ("answer", "output", "solution", "reward_model")
SOLUTION_COLUMNS = ("solution", "response", "completion", "messages", "conversations", "output")
#: Roles in ShareGPT conversations; OpenThoughts-114k uses the role names of messages.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
#: Of a message, what an assistant thinks and does beside its content, which alone is a solution.
_BESIDE = ("reasoning_content", "reasoning", "thinking", "tool_calls")
_SYSTEM = "system"  # beside conversations, the column of the system's message
_WAY_OUT = "rewrite it, or give another question_column"
_MOST_SHOWN = 200  # characters of a refused value
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Problem:
    """One question, its answer where the source has one, and the source's own record of it."""

    prompt: str | list[dict[str, Any]]
    answer: str | None
    record: Mapping[str, Any] = field(repr=False)

    def messages(self) -> list[dict[str, Any]]:
        """The prompt as a list of messages, for a tokenizer with a chat template."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt


class _Row(Mapping[str, Any]):
    """A row of a dataset, read when it is asked for: the texts of a large one take more memory than a model."""

    def __init__(self, dataset: Any, index: int):
        self.dataset, self.index = dataset, index

    def __getitem__(self, column: str) -> Any:
        if column not in self.dataset.column_names:
            raise KeyError(column)
        return self.dataset[self.index][column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset.column_names)


def load_problems(
    dataset_name: str | Path,
    split: str = "train",
    config: str | None = None,
    *,
    question_column: str | None = None,
    answer_column: str | None = None,
) -> list[Problem]:
    """Load problems.

    Args:
        dataset_name: ``reasoning-gym:TASK?size=N&seed=S`` (any other setting of the task may follow), the path of a
            JSONL, JSON or parquet file, or the name of a dataset on the hub.
        split, config: split and configuration of a hub dataset; the latter is needed if there are several. A file is
            whatever split is named, so that ``train[:100]`` is its first 100 rows.
        question_column, answer_column: names of columns; None: the first found of `QUESTION_COLUMNS`, and of
            `ANSWER_COLUMNS` if there is one.

    Returns:
        The problems in order. A question is a text or a list of messages, as ``{"role": "user", "content": "a text"}``
        or, as in ShareGPT, ``{"from": "human", "value": "a text"}``; an assistant's messages at the end are dropped,
        and a column ``system`` beside messages is the system's, unless they have one. An answer is a text or a number,
        or, as in verl's ``reward_model``, ``{"ground_truth": "a text"}``; None otherwise.

    Raises:
        ValueError: an unknown task or setting, another file type, no question column, or one that may be half of it, a
            row without a question, a configuration for something that is not on the hub.
    """
    if not isinstance(dataset_name, str | Path) or not dataset_name:
        raise ValueError(f"dataset_name must be a task, a file or a dataset of the hub, got {dataset_name!r}")
    dataset_name = str(dataset_name)
    if config is not None and (dataset_name.startswith("reasoning-gym:") or Path(dataset_name).is_file()):
        raise ValueError(f"only a dataset of the hub has configurations, got {config!r} for {dataset_name}")
    given = {"question_column": question_column, "answer_column": answer_column}
    given = {name: column for name, column in given.items() if column is not None}
    if dataset_name.startswith("reasoning-gym:"):
        if given:
            raise ValueError(f"{dataset_name} is a task without columns to name, got {given}")
        if "[" in split:
            raise ValueError(f"{dataset_name} has no splits to take a part of, got {split!r}; set its size")
        return _reasoning_gym(dataset_name)
    table = _table(dataset_name, split, config)
    columns = list(table.column_names)
    for name, column in given.items():
        if column not in columns:
            raise ValueError(f"{name} must be a column of {dataset_name}, {' or '.join(columns)}, got {column!r}")
    question = question_column or next((column for column in QUESTION_COLUMNS if column in columns), None)
    if question_column is None and question == "instruction" and "input" in columns:
        raise ValueError(
            f"{dataset_name} has columns instruction and input, of which a question may be in both, as in Alpaca; put "
            "them together in one column, or give the one that holds the question as question_column"
        )
    others = (column for column in ANSWER_COLUMNS if column in columns and column != question)
    answer = answer_column or next(others, None)
    if question is None:
        raise ValueError(
            f"{dataset_name} has none of the question columns {', '.join(QUESTION_COLUMNS)}; it has "
            f"{', '.join(columns) or 'no columns'}; give the one that holds the question as question_column"
        )
    read = {question, *([answer] if answer else []), *([_SYSTEM] if _SYSTEM in columns else [])}
    with _reading(dataset_name):  # which finds bytes that are not text
        rows = list(table.select_columns(sorted(read)))
    return [
        Problem(
            _prompt(row[question], row.get(_SYSTEM), f"row {index} of {dataset_name}"),
            None if answer is None else _answer(row[answer]),
            _Row(table, index),
        )
        for index, row in enumerate(rows)
    ]


def solution_of(problem: Problem, index: int, column: str | None = None) -> str | None:
    """The solution in a problem's record: a text, or the last of its messages; None if the place is empty, or this
    message is not the assistant's first after the problem's prompt.

    Args:
        index: of the problem, for what is raised.
        column: where it is; None: the first found of `SOLUTION_COLUMNS`.

    Raises:
        ValueError: no such column, neither a text nor messages in it, or a message with thinking or calls of tools
            beside its content.
    """
    record = problem.record
    name = column or next((name for name in SOLUTION_COLUMNS if name in record), None)
    if name is None or name not in record:
        raise ValueError(
            f"problem {index} must have a column {name or ' or '.join(SOLUTION_COLUMNS)} with its solution, got "
            f"{', '.join(record)}; give the one that holds it as solution_column"
        )
    found, where = record[name], f"column {name} of problem {index}"
    if isinstance(found, list) and found:
        messages = [_message(_renamed(each, where), where, "give another solution_column") for each in found]
        found = _last_answer(messages, problem, where)
    if found and not isinstance(found, str):
        raise ValueError(
            f"{where} must hold a text, or messages, got {_shown(found)}; give another one as solution_column"
        )
    return found if found and found.strip() else None


def _last_answer(messages: list[dict[str, Any]], problem: Problem, where: str) -> str | None:
    """What the assistant says last; None if that does not follow the prompt: another speaks last, or the assistant's
    messages before it are not all in the prompt."""
    *before, last = messages
    said, known = (sum(message["role"] == "assistant" for message in each) for each in (before, problem.messages()))
    if last["role"] != "assistant" or said != known:
        return None
    if beside := [name for name in _BESIDE if last.get(name)]:
        raise ValueError(
            f"{where} must have all that the assistant says last in its content, got {', '.join(beside)} beside it; "
            "put it into content as the student writes it, such as <think>...</think>, or give another solution_column"
        )
    return str(last["content"])


def _reasoning_gym(name: str) -> list[Problem]:
    import reasoning_gym

    parts = urlsplit(name)
    try:
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else []
        if blank := [key for key, value in given if not value.strip()]:
            raise ValueError(f"no value for {', '.join(blank)}")
        settings = {key: load_yaml(value) for key, value in given}
        dataset = reasoning_gym.create_dataset(parts.path, **settings)
    except (ValueError, TypeError, AssertionError, YAMLError) as error:
        raise ValueError(
            f"reasoning-gym cannot make task {parts.path!r} with {parts.query!r}: {' '.join(str(error).split())}; "
            "expected reasoning-gym:TASK?size=N&seed=S with the task's own settings"
        ) from error
    return [Problem(entry["question"], str(entry["answer"]), entry) for entry in dataset]


def _table(name: str, split: str, config: str | None) -> Any:
    """A dataset, whose rows are read as they are asked for."""
    import datasets

    path = Path(name)
    if not path.is_file():
        try:
            return datasets.load_dataset(name, config, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"{name!r} is neither a local file nor a dataset of the hub with split {split!r}: {error}"
            ) from error
    if path.suffix not in _READERS:
        raise ValueError(f"{name} must end in one of {', '.join(_READERS)}, got {path.suffix!r}")
    with _reading(name):
        whole = split.partition("[")[0]  # the file is the split that is asked for, of which a part may be
        return datasets.load_dataset(_READERS[path.suffix], data_files={whole: name}, split=split)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Name the dataset, and what is wrong with it, where it cannot be read."""
    import datasets

    try:
        yield
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        got = _broken_line(Path(name)) if name.endswith(".jsonl") and Path(name).is_file() else None
        got = got or str(error.__cause__ or error) or "no rows"  # for an empty file datasets gives no message
        raise ValueError(f"{name} must hold rows of one kind, each a problem, got {got}") from error


def _broken_line(path: Path) -> str | None:
    """What is wrong with the first invalid line of a JSONL file."""
    rows = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line) if line.strip() else {}
            except ValueError as error:
                return f"no JSON in line {number} ({getattr(error, 'msg', str(error)).removesuffix(' at')})"
            if not isinstance(found, dict):
                return f"no columns in line {number}: {_shown(found)}"
            rows += bool(found)
    return None if rows else "no rows"


def _shown(value: Any) -> str:
    """The beginning of a value, as JSON."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def _prompt(question: Any, system: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(question, str):
        if not question.strip():
            raise ValueError(f"{where} has an empty question, got {question!r}")
        return question
    if not isinstance(question, list):
        raise ValueError(
            f"{where} must have a text or a list of messages as its question, got {_shown(question)}; {_WAY_OUT}"
        )
    messages = [_renamed(message, where) for message in question]
    while messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{where} has no message but the assistant's: a prompt must end with the user's")
    found = [_message(message, where) for message in messages]
    if isinstance(system, str) and system.strip() and all(message["role"] != "system" for message in found):
        found.insert(0, {"role": "system", "content": system})
    return found


def _answer(answer: Any) -> str | None:
    """The text of an answer, which in verl's columns is ``{"ground_truth": ...}``; None if it is none."""
    found = answer.get("ground_truth") if isinstance(answer, Mapping) else answer
    return None if found is None or isinstance(found, Mapping | list) else str(found)


def _renamed(message: Any, where: str) -> Any:
    """A ShareGPT message with `role` and `content`; any other value unchanged."""
    if not isinstance(message, Mapping) or "role" in message or "from" not in message:
        return message
    role = _SHAREGPT_ROLES.get(message["from"]) if isinstance(message["from"], str) else None
    if role is None:
        raise ValueError(
            f"{where} must have messages from {', '.join(_SHAREGPT_ROLES)}, got one from {_shown(message['from'])}; "
            f"{_WAY_OUT}"
        )
    return {"role": role, "content": message.get("value")}


def _message(message: Any, where: str, way_out: str = _WAY_OUT) -> dict[str, Any]:
    """A message whose content is a text, with what else a chat template may read of it; a list of text parts is
    joined."""
    role, content = (message.get(name) if isinstance(message, Mapping) else None for name in ("role", "content"))
    if isinstance(content, list):
        is_text = [isinstance(part, Mapping) and part.get("type") == "text" for part in content]
        texts = [part.get("text") for part in content] if all(is_text) else []
        content = "".join(texts) if texts and all(isinstance(text, str) for text in texts) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(
            f'{where} must have messages as {{"role": "user", "content": "a text"}}, got {_shown(message)}; {way_out}'
        )
    others = {name: value for name, value in message.items() if value is not None}  # a table has null for "not there"
    return {**others, "role": role, "content": content}

"""Problems from a hub dataset, a local file or a procedural task, whatever their columns are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from motab.parsing import load_yaml

QUESTION_COLUMNS = ("question", "problem", "input", "prompt", "messages")
ANSWER_COLUMNS = ("answer", "output", "solution")
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Problem:
    """One question, its answer where the source has one, and the source's own record of it."""

    prompt: str | list[dict[str, str]]
    answer: str | None
    record: Mapping[str, Any] = field(repr=False)

    def messages(self) -> list[dict[str, str]]:
        """The prompt as a list of messages, for a tokenizer with a chat template."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt


def load_problems(dataset_name: str, split: str = "train", config: str | None = None) -> list[Problem]:
    """Load problems.

    Args:
        dataset_name: ``reasoning-gym:TASK?size=N&seed=S`` (any other setting of the task may follow), the path of a
            JSONL, JSON or parquet file, or the name of a dataset on the hub.
        split, config: of a hub dataset; the configuration is named where it has several.

    Returns:
        The problems in order. The question is the first column present of `QUESTION_COLUMNS`, the answer that of
        `ANSWER_COLUMNS`; an assistant's messages at the end of a conversation are not part of the prompt.

    Raises:
        ValueError: an unknown task or setting, a file of another kind, no known question column, an empty question, a
            configuration of what is not on the hub.
    """
    if config is not None and (dataset_name.startswith("reasoning-gym:") or Path(dataset_name).is_file()):
        raise ValueError(f"only a dataset of the hub has configurations, got {config!r} for {dataset_name}")
    if dataset_name.startswith("reasoning-gym:"):
        return _reasoning_gym(dataset_name)
    rows = _rows(dataset_name, split, config)
    columns = list(rows.column_names)
    question = next((column for column in QUESTION_COLUMNS if column in columns), None)
    answer = next((column for column in ANSWER_COLUMNS if column in columns and column != question), None)
    if question is None:
        raise ValueError(
            f"{dataset_name} has none of the question columns {', '.join(QUESTION_COLUMNS)}; it has "
            f"{', '.join(columns) or 'no columns'}; rename the one that holds the question"
        )
    return [
        Problem(
            _prompt(row[question], f"row {index} of {dataset_name}"),
            None if answer is None or row[answer] is None else str(row[answer]),
            row,
        )
        for index, row in enumerate(rows)
    ]


def _reasoning_gym(name: str) -> list[Problem]:
    import reasoning_gym

    parts = urlsplit(name)
    settings = {key: load_yaml(value) for key, value in parse_qsl(parts.query)}
    try:
        dataset = reasoning_gym.create_dataset(parts.path, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"reasoning-gym cannot make task {parts.path!r} with {settings}: {error}; "
            "expected reasoning-gym:TASK?size=N&seed=S with the task's own settings"
        ) from error
    return [Problem(entry["question"], str(entry["answer"]), entry) for entry in dataset]


def _rows(name: str, split: str, config: str | None) -> Any:
    import datasets

    path = Path(name)
    if not path.is_file():
        try:
            return datasets.load_dataset(name, config, split=split)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name!r} is neither a file here nor a dataset that the hub gives with split {split!r}: {error}"
            ) from error
    if path.suffix not in _READERS:
        raise ValueError(f"{name} must end in one of {', '.join(_READERS)}, got {path.suffix!r}")
    return datasets.load_dataset(_READERS[path.suffix], data_files=name, split="train")


def _prompt(question: str | Sequence[Mapping[str, str]], where: str) -> str | list[dict[str, str]]:
    if isinstance(question, str):
        if not question.strip():
            raise ValueError(f"{where} has an empty question, got {question!r}")
        return question
    messages = [{"role": message["role"], "content": message["content"]} for message in question]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{where} has no message but the assistant's: a prompt must end with the user's")
    return messages

"""Trajectories as training examples: the id of each token, and whether it is trained on."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from motab.processes import process_state
from motab.trajectory import Trajectory, ignored_authors
from motab.trajectory_file import trajectories_in

IGNORED = -100


class TrajectoryDataset(Dataset[dict[str, list[int]]]):
    """Trajectories as ``input_ids`` and ``labels``; the prompt and ignored authors have label -100.

    Holds five bytes per token, where a `Trajectory` with its statistics takes about 400; reads a file line by line.

    Args:
        trajectories: the trajectories, or the file that `synthesize_to_file` wrote; an incomplete last line is
            left out.
        ignore_authors: whose tokens are not trained on ("student", "flawed", "stitch", "teacher").
        max_length: leave out trajectories of more tokens, prompt and target together.
        only_correct: leave out trajectories that do not answer their problem; all must have been graded.

    Trajectories without a token to train on are left out too: a step on them would be lost, and PyTorch's mean
    cross-entropy of a batch of them is NaN. One warning counts all that are left out.

    Attributes:
        ignore_authors, max_length, only_correct: as given.
        end_tokens: the end tokens of the trajectories that did not run out of budget.

    Raises:
        ValueError: an unknown author, or all authors; a line that is not a trajectory; a trajectory whose tokens and
            authors differ in number; one that was not graded, with ``only_correct``; no trajectory is left.
    """

    def __init__(
        self,
        trajectories: Iterable[Trajectory] | str | Path,
        ignore_authors: str | Sequence[str] = (),
        max_length: int | None = None,
        only_correct: bool = False,
    ):
        self.ignore_authors = ignored_authors(ignore_authors)
        self.max_length, self.only_correct = max_length, only_correct
        ignored, longer, wrong, idle = frozenset(self.ignore_authors), 0, 0, 0
        self.end_tokens: set[int] = set()
        self.ids: list[np.ndarray] = []  # int32, prompt and target
        self.trained: list[np.ndarray] = []  # bool, target only
        source = trajectories
        for t in trajectories_in(source, statistics=False) if isinstance(source, str | Path) else source:
            ids, trained = encode(t, ignored)
            if max_length is not None and len(ids) > max_length:
                longer += 1
                continue
            if only_correct and t.correct is None:
                of_file = f" of {source}" if isinstance(source, str | Path) else ""
                raise ValueError(
                    f"only_correct needs graded trajectories, got trajectory {t.index}{of_file} without a grade; run "
                    "its motab synthesize again with --grade, which grades those that are written"
                )
            if only_correct and not t.correct:
                wrong += 1
                continue
            if not trained.any():
                idle += 1
                continue
            if t.finish_reason == "eos":
                self.end_tokens.add(t.token_ids[-1])
            self.ids.append(ids)
            self.trained.append(trained)
        of = f"of {longer + wrong + idle + len(self.ids)} trajectories"
        reasons = {
            f"{longer} {of} have more than max_length {max_length} tokens": longer,
            f"{wrong} {of} have a wrong answer": wrong,
            f"{idle} {of} have no token to train on": idle,
        }
        if left_out := " and ".join(reason for reason, count in reasons.items() if count):
            if not self.ids:
                ways = {"raise max_length": longer, "leave only_correct out": wrong, "ignore fewer authors": idle}
                raise ValueError(f"{left_out}: none is left; {' or '.join(way for way in ways if ways[way])}")
            if process_state().is_main_process:
                warnings.warn(f"{left_out}; they are left out", stacklevel=2)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def num_trained(self) -> int:
        """The tokens that are trained on, of all trajectories."""
        return sum(int(trained.sum()) for trained in self.trained)

    def prompt(self, index: int) -> np.ndarray:
        """The token ids of a prompt, int32."""
        return self.ids[index][: len(self.ids[index]) - len(self.trained[index])]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return example(self.ids[index], self.trained[index])


def encode(t: Trajectory, ignored: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of prompt and target, int32, and which of the target's tokens are trained on, bool."""
    if len(t.author) != len(t.token_ids):
        raise ValueError(f"trajectory {t.index} has {len(t.token_ids)} tokens and {len(t.author)} authors")
    trained = [author not in ignored for author in t.author]
    return np.array(t.prompt_ids + t.token_ids, dtype=np.int32), np.array(trained, dtype=np.bool_)


def labels(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The labels of what `encode` returns, int32."""
    found = np.full_like(ids, IGNORED)
    np.copyto(found[len(ids) - len(trained) :], ids[len(ids) - len(trained) :], where=trained)
    return found


def example(ids: np.ndarray, trained: np.ndarray) -> dict[str, list[int]]:
    """What `encode` returns as `collate` takes it."""
    return {"input_ids": ids.tolist(), "labels": labels(ids, trained).tolist()}


def collate(examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch padded on the right: input_ids, attention_mask and labels, each (B, T)."""
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(rows: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded([example["labels"] for example in examples], IGNORED),
    }

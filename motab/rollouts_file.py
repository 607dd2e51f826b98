"""The file of what a student writes during training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from motab.trajectory import Trajectory
from motab.trajectory_file import cut_from


class RolloutsFile:
    """The trajectories that a training writes, in ``folder/trajectories.jsonl``, with the tokenizer beside them."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None):
        self.path, self.tokenizer = folder / "trajectories.jsonl", tokenizer
        self.next_step: int | None = None  # of the training that the file is whole of

    def add(self, written: Iterable[Trajectory], step: int, first_index: int) -> None:
        """Append what was written before a step. Where a training begins, anew or at a checkpoint, what another wrote
        from `first_index` on is dropped."""
        if step != self.next_step:
            assert self.tokenizer is not None
            cut_from(self.path, first_index)
            self.tokenizer.save_pretrained(self.path.parent)
        self.next_step = None  # an exception may leave a part of it
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(trajectory.to_json() + "\n" for trajectory in written)
        self.next_step = step + 1

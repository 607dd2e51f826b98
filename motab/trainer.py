"""Training on trajectories by cross-entropy: the paper's recipe, through transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from motab.synthesis import read_trajectories
from motab.trajectory import AUTHORS, Trajectory

IGNORED = -100


@dataclass
class MotabConfig(TrainingArguments):
    """TrainingArguments with the paper's defaults and one setting more.

    Attributes:
        ignore_authors: leave the tokens of these authors out of the loss ("student", "flawed", "stitch", "teacher");
            they stay in the context. The paper trains on all.
    """

    learning_rate: float = 5e-5
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr": 1e-6})
    num_train_epochs: float = 6.0
    ignore_authors: list[str] = field(
        default_factory=list, metadata={"help": "Authors whose tokens are left out of the loss: " + ", ".join(AUTHORS)}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # where there is none, torch only warns
        self.remove_unused_columns = False  # the dataset holds what the model takes, and nothing else
        if unknown := sorted(set(self.ignore_authors) - set(AUTHORS)):
            raise ValueError(f"ignore_authors must be among {', '.join(AUTHORS)}, got {', '.join(unknown)}")
        if set(self.ignore_authors) >= set(AUTHORS):
            raise ValueError("ignore_authors names every author: no token would be left to train on")


class TrajectoryDataset(Dataset[dict[str, list[int]]]):
    """Trajectories as ``input_ids`` and ``labels``; the prompt and ignored authors have label -100."""

    def __init__(self, trajectories: Sequence[Trajectory], ignore_authors: Sequence[str] = ()):
        self.trajectories, self.ignore_authors = trajectories, frozenset(ignore_authors)

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        trajectory = self.trajectories[index]
        labels = [IGNORED] * len(trajectory.prompt_ids) + [
            IGNORED if author in self.ignore_authors else token
            for token, author in zip(trajectory.token_ids, trajectory.author, strict=True)
        ]
        return {"input_ids": trajectory.prompt_ids + trajectory.token_ids, "labels": labels}


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


class MotabTrainer(Trainer):
    """Trains a student on trajectories by cross-entropy.

    Args:
        model: the student.
        teacher_model: not needed, since the trajectories hold what the teacher wrote; refused when given.
        args: `MotabConfig`.
        train_dataset: trajectories, or the file that `synthesize_to_file` wrote.
        processing_class: the tokenizer, saved with the model.

    Raises:
        ValueError: no trajectories, or a teacher.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel | None = None,
        args: MotabConfig | None = None,
        *,
        train_dataset: Sequence[Trajectory] | str | Path,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        if teacher_model is not None:
            raise ValueError(
                "MotabTrainer trains by cross-entropy on trajectories that are already written, got a teacher_model "
                "besides; let motab.synthesize use the teacher, and leave it out here"
            )
        args = MotabConfig(output_dir="runs/train") if args is None else args
        trajectories = read_trajectories(train_dataset) if isinstance(train_dataset, str | Path) else train_dataset
        if not trajectories:
            raise ValueError("train_dataset must hold at least one trajectory, got none")
        super().__init__(
            model=model,
            args=args,
            train_dataset=TrajectoryDataset(trajectories, args.ignore_authors),
            data_collator=collate,
            processing_class=processing_class,
            **kwargs,
        )

"""The settings of each command."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motab.argument_groups import (
    ATTENTION,
    DATASET,
    SPLIT,
    BitsArguments,
    GenerationArguments,
    PolicyArguments,
    PromptArguments,
    TeacherBitsArguments,
    first_of,
    unset,
)
from motab.data import SOLUTION_COLUMNS
from motab.dataset import TrajectoryDataset
from motab.generation import SETTINGS
from motab.models import DTYPES, dtype_name, holds_adapters
from motab.parsing import require_file, setting
from motab.prompts import Prompt
from motab.rollouts import Rollouts
from motab.trajectory import AUTHORS, Grade


@dataclass
class SynthesizeArguments(PolicyArguments, PromptArguments, GenerationArguments, TeacherBitsArguments):
    """motab synthesize: write trajectories to OUTPUT_DIR/trajectories.jsonl; run again to continue."""

    model_name_or_path: str = setting("", "The student; teacher_only needs none, and a small one makes it faster.")
    teacher_model_name_or_path: str = setting("", "The teacher.")
    dataset_name: str = setting("", DATASET)
    dataset_split: str = setting("train", SPLIT)
    output_dir: str = setting("runs/synthesize", "Folder for trajectories.jsonl.")
    num_samples: int = setting(1, "Trajectories per question.")
    grade: bool = setting(
        False, "Grade each trajectory by the answer to its problem, for motab report and motab train --only_correct."
    )
    share_teacher: bool = setting(
        False, "Split one teacher among all processes (tensor parallel), which then write together."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1 or (self.num_samples > 1 and self.temperature == 0):
            raise ValueError(
                f"--num_samples must be at least 1, and 1 at --temperature 0, where all are equal, got "
                f"{self.num_samples} at {self.temperature}"
            )


@dataclass
class ImportArguments(PromptArguments):
    """motab import: make trajectories of the solutions that a dataset holds, to train on."""

    model_name_or_path: str = setting("", "The student, whose tokenizer and chat template are used.")
    dataset_name: str = setting("", "Hub name, JSONL, JSON or parquet file.")
    dataset_split: str = setting("train", SPLIT)
    solution_column: str | None = unset(
        "Column of the solution: a text, or messages of which the last is the assistant's.", first_of(SOLUTION_COLUMNS)
    )
    output_dir: str = setting("runs/import", "Folder for trajectories.jsonl.")
    grade: bool = setting(False, "Grade each solution by the answer to its problem, for motab train --only_correct.")


@dataclass
class EvaluateArguments(PromptArguments, GenerationArguments, BitsArguments):
    """motab evaluate: accuracy of a model on problems with answers."""

    model_name_or_path: str = setting("", "The model.")
    dataset_name: str = setting("", DATASET)
    dataset_split: str = setting("test", SPLIT)
    num_samples: int = setting(1, "Answers per problem.")
    output_file: str | None = setting(None, "JSON file for the results and these settings.")
    answers_file: str | None = setting(None, "JSONL file for the answers; with it an interrupted evaluation resumes.")


#: By flag of `motab train`, the settings of `Rollouts`; some names without a prefix are settings of the training.
_ROLLOUT_FLAGS = {
    f"rollout_{name}" if name in ("batch_size", "temperature", "torch_compile") else name: name
    for name in SETTINGS
    if name != "seed"
}


#: Of new adapters, by the names of `motab.models.with_lora`, and with the prefix lora_ flags of `motab train`.
_LORA = {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": ["all-linear"]}


@dataclass
class TrainArguments(PolicyArguments, PromptArguments, TeacherBitsArguments):
    """motab train: train on the trajectories of a synthesis, or on those that the student writes during training."""

    model_name_or_path: str = setting("", "The student.")
    teacher_model_name_or_path: str = setting("", "The teacher, if loss_type is a divergence or the policy needs one.")
    train_file: str = setting("", "trajectories.jsonl of motab synthesize or import.")
    lmbda: float | None = unset(
        "With train_file: the probability that the student writes anew on a trajectory's prompt, which is trained on "
        "in its place.",
        0,
    )
    eval_file: str = setting("", "Held-out trajectories; their loss is measured at the end and by --eval_strategy.")
    dataset_name: str = setting(
        "", "Instead of train_file: problems on which the student writes at every step. " + DATASET
    )
    dataset_split: str | None = unset(SPLIT, "train")
    max_new_tokens: int | None = unset("Rollouts: tokens to write after the prompt, at most.", Rollouts.max_new_tokens)
    rollout_batch_size: int | None = unset("Rollouts: trajectories in progress at a time.", Rollouts.batch_size)
    block_size: int | None = unset(
        "Rollouts: tokens that the student drafts before the teacher scores them.", Rollouts.block_size
    )
    rollout_temperature: float | None = unset("Rollouts: sampling temperature; 0 is greedy.", Rollouts.temperature)
    top_k: int | None = unset("Rollouts: sample among the k likeliest tokens.", "all")
    top_p: float | None = unset(
        "Rollouts: sample among the fewest likeliest tokens with this total probability.", Rollouts.top_p
    )
    min_p: float | None = unset(
        "Rollouts: sample among tokens with at least this share of the likeliest one's probability.", 0
    )
    rollout_torch_compile: bool | None = unset("Rollouts: compile the models.", Rollouts.torch_compile)
    max_cached_tokens: int | None = unset(
        "Rollouts: tokens that the key-value cache of each model holds.", "what free memory holds"
    )
    grade: bool | None = unset("Rollouts: grade each by the answer to its problem; the log has the share.", False)
    dtype: str = setting("float32", f"Weight dtype of the student: {', '.join(DTYPES)}.")
    teacher_dtype: str = setting("auto", "Weight dtype of the teacher; auto: as saved.")
    use_peft: bool = setting(False, "Train low-rank adapters (LoRA) instead of the weights; needs the package peft.")
    lora_r: int | None = unset("LoRA: rank.", _LORA["r"])
    lora_alpha: int | None = unset("LoRA: scale of the adapters, over the rank.", _LORA["alpha"])
    lora_dropout: float | None = unset("LoRA: dropout.", _LORA["dropout"])
    lora_target_modules: list[str] | None = setting(
        None, "LoRA: names of the modules to adapt. (default: all linear layers but the head)"
    )
    attn_implementation: str | None = setting(None, ATTENTION)

    def __post_init__(self) -> None:
        self.dtype, self.teacher_dtype = dtype_name(self.dtype), dtype_name(self.teacher_dtype)

    def check_source(self) -> None:
        """Refuse no source or two, a missing file, settings of writing where nothing is written and of problems where
        there are none, settings of adapters where none are made, and weights in few bits without adapters.

        Raises:
            ValueError: names the settings, and what to give instead.
        """
        if bool(self.train_file) == bool(self.dataset_name):
            got = f"{self.train_file!r} and {self.dataset_name!r}"
            raise ValueError(f"give either --train_file or --dataset_name (to write during training), got {got}")
        if self.bits() and not self.use_peft:
            raise ValueError(
                f"--load_in_{self.bits()}bit loads weights that are too coarse to be trained; give --use_peft, which "
                "trains adapters beside them, or leave it out"
            )
        of_lora = ", ".join(f"--lora_{name}" for name in _LORA if getattr(self, f"lora_{name}") is not None)
        if of_lora and not self.use_peft:
            raise ValueError(f"{of_lora} set adapters, which --use_peft trains; give it, or leave them out")
        if of_lora and holds_adapters(self.model_name_or_path):
            raise ValueError(
                f"{of_lora} set new adapters, got those of {self.model_name_or_path!r}, which are trained as they "
                "are; leave them out"
            )
        if self.lmbda is not None and not self.train_file:
            raise ValueError(
                f"--lmbda {self.lmbda:g} mixes what the student writes with --train_file, got none; motab import makes "
                "one of a dataset's solutions"
            )
        of_problems = [entry.name for entry in dataclasses.fields(PromptArguments)] + ["dataset_split", "grade"]
        writing = [entry.name for entry in dataclasses.fields(PolicyArguments)] + [*_ROLLOUT_FLAGS]
        idle = of_problems if self.writes() else of_problems + writing
        given = [f"--{name}" for name in idle if getattr(self, name) is not None]
        if self.train_file and given:
            kind, way = ("problems", "") if self.writes() else ("writing", ", or --lmbda, to write during training")
            raise ValueError(
                f"--train_file takes no settings of {kind}, got {', '.join(given)}: leave them out, or give "
                f"--dataset_name instead of --train_file{way}"
            )
        for name in ("train_file", "eval_file"):
            if path := getattr(self, name):
                require_file(path, name, "motab synthesize writes OUTPUT_DIR/trajectories.jsonl")

    def writes(self) -> bool:
        """Whether the student writes during training."""
        return bool(self.dataset_name or self.lmbda)

    def lora(self) -> dict[str, Any] | None:
        """The settings of `motab.models.with_lora`, None where no new adapters are made."""
        if not self.use_peft or holds_adapters(self.model_name_or_path):
            return None
        given = {name: getattr(self, f"lora_{name}") for name in _LORA}
        found = _LORA | {name: value for name, value in given.items() if value is not None}
        if found["target_modules"] == ["all-linear"]:
            found["target_modules"] = "all-linear"  # a name that peft knows
        return found

    def rollouts(self, prompts: Sequence[Prompt] | TrajectoryDataset, grade: Grade | None = None) -> Rollouts:
        """The `Rollouts` of these settings."""
        flags = {**_ROLLOUT_FLAGS, "lmbda": "lmbda"}
        given = {name: getattr(self, flag) for flag, name in flags.items() if getattr(self, flag) is not None}
        return Rollouts(prompts, self.make_policy(), grade=grade, **given)


@dataclass
class FileArguments:
    """motab verify | report: look at the trajectories of a synthesis."""

    output_dir: str = setting("runs/synthesize", "Folder of the synthesis.")

    @property
    def file(self) -> Path:
        """The trajectories.

        Raises:
            ValueError: there is no such file.
        """
        path = Path(self.output_dir) / "trajectories.jsonl"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; motab synthesize --output_dir {self.output_dir} makes it")
        return path


@dataclass
class ShowArguments(FileArguments):
    """motab show: print one trajectory of a synthesis."""

    index: int = setting(0, "Index of the trajectory.")


@dataclass
class ExportArguments(FileArguments):
    """motab export: write the trajectories of a synthesis as token ids and labels, for TRL's SFTTrainer or axolotl."""

    output_file: str = setting("", "File to write; ends in .parquet or .jsonl.")
    ignore_authors: list[str] = field(
        default_factory=list, metadata={"help": "Authors whose tokens get label -100: " + ", ".join(AUTHORS)}
    )
    max_length: int | None = setting(None, "Leave out trajectories of more tokens than this.")
    only_correct: bool = setting(False, "Leave out trajectories with a wrong answer; needs motab synthesize --grade.")

"""The settings of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from transformers import TrainingArguments

from motab.parsing import setting
from motab.trajectory import AUTHORS, ignored_authors

LossType = Literal["cross_entropy", "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
LOSS_TYPES = get_args(LossType)
#: Settings of the loss, and the losses that use them.
_USED_BY = {
    "label_smoothing_factor": ("cross_entropy",),
    "beta": ("jsd",),
    "alpha": ("skew_forward_kl", "skew_reverse_kl"),
    "temperature": LOSS_TYPES[1:],
}


@dataclass
class MotabConfig(TrainingArguments):
    """TrainingArguments with the paper's defaults and settings of the loss.

    Attributes:
        lr_scheduler_type, lr_scheduler_kwargs: the paper's cosine, which falls to ``min_lr``: 1e-6, or half the
            learning rate if that is less. Other schedules have no such default.
        logging_steps: 10, as in TRL.
        save_steps, save_total_limit, eval_steps: ten checkpoints per run, of which the last is kept, and with
            ``eval_strategy`` "steps" as many evaluations.
        ddp_find_unused_parameters: False, since a causal language model uses all of its parameters, and the search for
            unused ones copies every output of the model: logits, hidden states.
        loss_type: "cross_entropy" on the tokens of the trajectories, or a divergence of the student from the teacher at
            each of them: "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl" or "tvd". `OnPolicy`
            `Rollouts` and "reverse_kl" are the paper's on-policy distillation (it takes a learning rate of 2e-6).
        beta, alpha, temperature: settings of the divergence, see `motab_kernels.divergence_loss`. A loss refuses those
            that it does not use, and a divergence ``label_smoothing_factor``.
        ignore_authors: leave the tokens of these authors out of the loss ("student", "flawed", "stitch", "teacher");
            they stay in the context. The paper trains on all.
        max_length: leave out trajectories of more tokens, prompt and target together; None: keep all. `Rollouts` have
            ``max_new_tokens`` instead.
        padding_free: compute a batch as one sequence of all its tokens, without padding, which flash attention reads
            row by row; other attention masks all rows from each other, in memory that is quadratic in the sum of their
            lengths. The loss is the same; models that read rows otherwise are refused at the start.
        only_correct: leave out trajectories that do not answer their problem (`Trajectory.correct`), held-out ones too;
            all must have been graded. The paper trains on all.
        save_rollouts: keep the trajectories of `Rollouts` in ``output_dir/rollouts/trajectories.jsonl`` as they are
            written, with the tokenizer beside it, for ``motab show`` and ``motab report``; with several processes those
            of the main one.
    """

    output_dir: str = setting("runs/train", "Folder of the trained model.")
    learning_rate: float = setting(5e-5, "Peak learning rate.")
    lr_scheduler_type: str = setting("cosine_with_min_lr", "Learning rate schedule.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the schedule, in JSON or YAML. (default of cosine_with_min_lr: min_lr 1e-6, or half "
            "the learning rate if less)"
        },
    )
    num_train_epochs: float = setting(6.0, "Passes over the trajectories or prompts.")
    logging_steps: float = setting(10, "Steps between entries of the log; below 1, as a share of the run.")
    save_steps: float = setting(0.1, "Steps between checkpoints; below 1, as a share of the run.")
    eval_steps: float | None = setting(
        0.1, "Steps between evaluations (--eval_strategy steps); below 1, as a share of the run."
    )
    save_total_limit: int | None = setting(1, "Checkpoints to keep.")
    ddp_find_unused_parameters: bool | None = setting(
        False, "Search for parameters without a gradient (DistributedDataParallel)."
    )
    loss_type: LossType = setting("cross_entropy", "Cross-entropy, or a divergence from the teacher.")
    beta: float = setting(0.5, "jsd: share of the teacher in the mixture; 0 is forward_kl, 1 reverse_kl.")
    alpha: float = setting(
        0.1, "skew_forward_kl, skew_reverse_kl: share of the teacher, or of the student, in the mixture."
    )
    temperature: float = setting(1.0, "Divisor of both models' logits in a divergence.")
    ignore_authors: list[str] = field(
        default_factory=list, metadata={"help": "Authors whose tokens are left out of the loss: " + ", ".join(AUTHORS)}
    )
    max_length: int | None = setting(None, "Leave out trajectories of more tokens than this.")
    padding_free: bool = setting(
        False, "Compute batches without padding; for --attn_implementation flash_attention_2 and batches above 1."
    )
    only_correct: bool = setting(
        False, "Leave out trajectories with a wrong answer; needs those of motab synthesize --grade."
    )
    save_rollouts: bool = setting(
        False, "Keep what is written during training in OUTPUT_DIR/rollouts, for motab show and report."
    )

    def __post_init__(self) -> None:
        # Without this, each of several processes on a CPU takes itself for the only one.
        self.use_cpu |= not torch.accelerator.is_available()
        super().__post_init__()
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # without one, pinning only warns
        self.remove_unused_columns = False  # the dataset holds only the model's inputs
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr": min(1e-6, self.learning_rate / 2)}
        schedule = self.lr_scheduler_kwargs if isinstance(self.lr_scheduler_kwargs, dict) else {}
        least = schedule.get("min_lr")
        if least is not None and least > self.learning_rate:
            raise ValueError(
                f"min_lr of lr_scheduler_kwargs must be at most the learning rate {self.learning_rate}, got {least}: "
                "the schedule would rise; lower it, or leave it out"
            )
        if least is not None and self.deepspeed_plugin and self.lr_scheduler_type.endswith("with_min_lr"):
            # The schedule asks the optimizer for the peak, which DeepSpeed's does not know.
            self.lr_scheduler_kwargs = {**schedule, "min_lr": None, "min_lr_rate": least / self.learning_rate}
        if self.loss_type not in LOSS_TYPES:  # flags are checked by the parser, other values are not
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {self.loss_type!r}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in 0 to 1, of which 0 is forward_kl and 1 reverse_kl, got {self.beta}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must be at least 0 and below 1, got {self.alpha}; DistiLLM takes 0.1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and above 0, got {self.temperature}: it divides the logits of a "
                "divergence; generation during training has a temperature of its own"
            )
        for name, losses in _USED_BY.items():
            value = getattr(self, name)
            if self.loss_type not in losses and value != self.__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} is a setting of loss_type {', '.join(losses)}, got {value} with {self.loss_type}; "
                    "leave it out"
                )
        self.ignore_authors = ignored_authors(self.ignore_authors)
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(
                f"max_length must be at least 1, or None for trajectories of any length, got {self.max_length}"
            )

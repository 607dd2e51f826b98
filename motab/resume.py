"""Resuming a training: from which checkpoint, and only with the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motab.arguments import TrainArguments
from motab.config import MotabConfig
from motab.dataset import TrajectoryDataset
from motab.files import write_whole
from motab.fingerprint import differences, hash_of_prompts, policy_settings
from motab.generation import PACE, SETTINGS
from motab.rollouts import Rollouts

FILE = "motab_training.json"
#: Arguments that decide the outcome of a training. The number of trajectories per step is another; logging, saving and
#: speed are not.
DECISIVE = (
    *("loss_type", "beta", "alpha", "temperature", "ignore_authors", "max_length"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
    *("bf16", "fp16", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)


def decisive_settings(
    args: TrainArguments, config: MotabConfig, data: str | Rollouts, weights: Mapping[str, str | None]
) -> dict[str, Any]:
    """The settings that decide the outcome of ``motab train``, as JSON returns them. A file counts by its content, and
    the student and the teacher by their weights, of which `weights` has the hashes."""
    found: dict[str, Any] = {
        **weights,
        "dtype": args.dtype,
        "trajectories of a step": config.per_device_train_batch_size
        * config.gradient_accumulation_steps
        * config.world_size,
    }
    if args.teacher_model_name_or_path:
        found["teacher_dtype"] = args.teacher_dtype
    found |= {f"{of}bits": args.bits(of) for of in ("", "teacher_") if args.bits(of)}
    if args.use_peft:
        found["lora"] = args.lora() or "that of model_name_or_path"
    if isinstance(data, Rollouts):
        found |= policy_settings(data.policy)
        found |= {f"rollout {name}": getattr(data, name) for name in SETTINGS if name not in (*PACE, "seed")}
        if not isinstance(data.prompts, TrajectoryDataset):
            found["prompts"] = hash_of_prompts(data.prompts)
    if args.train_file:
        found |= {"content of train_file": _hash_of_file(args.train_file), "lmbda": args.lmbda or None}
    if config.load_best_model_at_end and args.eval_file:
        found["content of eval_file"] = _hash_of_file(args.eval_file)
    if config.only_correct:
        found["only_correct"] = True
    found |= {name: getattr(config, name) for name in DECISIVE if hasattr(config, name)}
    return json.loads(json.dumps(found, default=str))


def last_checkpoint(folder: str | Path, settings: dict[str, Any]) -> tuple[str | None, bool]:
    """The last complete checkpoint of a training with these settings, and whether that training has finished.

    Raises:
        ValueError: the folder holds checkpoints of a training with other settings, or the last one holds the model
            alone.
    """
    folder = Path(folder)
    # trainer_state.json is written last: a checkpoint without it is incomplete.
    whole = (path.parent for path in folder.glob("checkpoint-*/trainer_state.json"))
    steps = {int(step): path for path in whole if (step := path.name.removeprefix("checkpoint-")).isdigit()}
    path = folder / FILE
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = before.get("settings", {})
    different = differences(known, settings)
    if steps and different:
        raise ValueError(
            f"{folder} holds checkpoints of a training with other settings "
            f"({different if known else f'unknown: there is no {FILE}'}); give another --output_dir, remove it to "
            "start again, or name the checkpoint to continue from with --resume_from_checkpoint"
        )
    last = steps[max(steps)] if steps else None
    finished = bool(before.get("finished")) and not different
    # Without the states of random numbers, optimizer and schedule the latter two would begin anew, in silence.
    if last is not None and not finished and not any(last.glob("rng_state*.pth")):
        raise ValueError(
            f"{last} must hold the state of a training, got the model alone, as save_only_model leaves it; remove "
            f"{folder} to start again, or name the checkpoint with --resume_from_checkpoint to train on from its "
            "weights with a new optimizer and schedule"
        )
    return None if last is None else str(last), finished


def record(folder: str | Path, settings: dict[str, Any], *, finished: bool) -> None:
    """Record the settings of a training, and whether it has finished."""
    write_whole(Path(folder) / FILE, json.dumps({"settings": settings, "finished": finished}, indent=1))


def _hash_of_file(path: str) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as lines:
        for line in lines:
            found.update(line)
    return found.hexdigest()

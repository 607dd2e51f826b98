"""What `MotabTrainer` takes, and what it refuses before a file is read or a model loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, TrainingArguments

from motab.config import MotabConfig
from motab.dataset import TrajectoryDataset
from motab.models import processes_sharing
from motab.policies import needs_student, needs_teacher
from motab.quantization import is_trained_by_adapters_alone, method
from motab.rollouts import Rollouts
from motab.sharding import saves_whole, uses_zero3
from motab.trajectory import Trajectory

#: What Trainer takes and this one does not, and why: most would be passed over in silence.
_NOT_TAKEN = {
    "compute_loss_func": "loss_type says which loss is taken",
    "compute_metrics": "the logits of an evaluation are not held; a callback may call motab.evaluate",
    "preprocess_logits_for_metrics": "the logits of an evaluation are not held",
    "data_collator": "motab.collate makes the batches",
    "model_init": "give a model, and to each trial of a search a trainer of its own",
}

#: Settings of accelerate's loaders that would repeat rows, leave some out or let processes wait for each other.
_OF_LOADERS = {"dispatch_batches": False, "split_batches": False, "even_batches": True}

Trajectories = Sequence[Trajectory] | TrajectoryDataset | str | Path


def as_examples(data: Trajectories, args: MotabConfig) -> TrajectoryDataset:
    """The trajectories as the trainer takes them; anything else is refused."""
    if isinstance(data, TrajectoryDataset):
        return data
    source = data if isinstance(data, str | Path) else _looked_at(data)
    return TrajectoryDataset(source, args.ignore_authors, args.max_length, args.only_correct)


def _looked_at(data: Any) -> Iterator[Trajectory]:
    for item in data if isinstance(data, Iterable) else [data]:
        if not isinstance(item, Trajectory):
            of = f" of {type(item).__name__}" if item is not data else ""
            raise ValueError(
                "a dataset must hold trajectories, or be the file that synthesize_to_file wrote, got "
                f"{type(data).__name__}{of}; let motab.synthesize_to_file write on its prompts, or train on "
                "motab.Rollouts(prompts)"
            )
        yield item


def check(args: Any, teacher_model: Any, train_dataset: Any, processing_class: Any) -> None:
    """Refuse arguments that do not go together, before a file is read or a model loaded."""
    if not isinstance(args, MotabConfig):
        raise ValueError(f"args must be a MotabConfig, which takes the same settings, got {type(args).__name__}")
    found = {name: getattr(args.accelerator_config, name) for name in _OF_LOADERS}
    if changed := [f"{name} {value}" for name, value in found.items() if value not in (None, _OF_LOADERS[name])]:
        raise ValueError(
            f"each process must read batches of its own and of one size, got {', '.join(changed)} in "
            "accelerator_config; leave it out (per_device_train_batch_size is that of a process)"
        )
    has_rollouts = isinstance(train_dataset, Rollouts)
    by_divergence = args.loss_type != "cross_entropy"
    if teacher_model is None and by_divergence:
        raise ValueError(f"loss_type {args.loss_type} compares the student with a teacher; give teacher_model")
    if teacher_model is not None and not by_divergence and not has_rollouts:
        raise ValueError(
            "MotabTrainer needs no teacher for cross-entropy on finished trajectories, got a teacher_model; "
            "leave it out, or set loss_type to a divergence such as forward_kl"
        )
    if args.save_rollouts and not has_rollouts:
        raise ValueError("save_rollouts keeps what Rollouts write, got finished trajectories; leave it out")
    given = train_dataset.given if isinstance(train_dataset, Rollouts) else train_dataset
    if isinstance(given, TrajectoryDataset):
        names = [name for name in ("ignore_authors", "max_length", "only_correct") if getattr(args, name)]
        if own := [name for name in names if getattr(args, name) != getattr(given, name)]:
            raise ValueError(f"a TrajectoryDataset is taken as it is, got {', '.join(own)}: set them when it is made")
    if not has_rollouts:
        return
    if not needs_student(train_dataset.policy):
        name = type(train_dataset.policy).__name__
        raise ValueError(
            f"Rollouts need a policy under which the student writes, got {name}; write its trajectories once with "
            "synthesize"
        )
    ignored = args.ignore_authors if given is None else given.ignore_authors
    if "student" in ignored and not needs_teacher(train_dataset.policy):
        name = type(train_dataset.policy).__name__
        raise ValueError(f"ignore_authors must leave a token to train on, got student, who alone writes under {name}")
    if processing_class is None:
        raise ValueError("Rollouts need the tokenizer; give processing_class")
    if args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "train_sampling_strategy group_by_length applies to finished trajectories, got Rollouts, whose lengths are "
            "not known; leave it out"
        )
    if args.only_correct and given is None:
        raise ValueError("only_correct applies to finished trajectories, got Rollouts, which are all trained on")
    if args.max_length is not None and given is None:
        raise ValueError(
            f"max_length applies to finished trajectories, got {args.max_length} with Rollouts; give them "
            "max_new_tokens"
        )


def refuse_of_trainer(settings: Mapping[str, Any]) -> None:
    """Keyword arguments of Trainer that would change nothing, or would be given what is not there."""
    for name, reason in _NOT_TAKEN.items():
        if settings.get(name) is not None:
            raise ValueError(f"MotabTrainer takes no {name}, got {settings[name]!r}: {reason}")


def refuse_frozen(model: PreTrainedModel) -> None:
    """A model of which nothing is trained, as transformers loads adapters, or nothing can be."""
    is_bare = isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False)
    if is_bare and is_trained_by_adapters_alone(model):
        raise ValueError(
            f"weights in few bits ({method(model)}) are too coarse to be trained, got {type(model).__name__} without "
            "adapters; give it some (--use_peft, motab.models.with_lora), or load it in another dtype"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"model must have a parameter to train, got {type(model).__name__} with none; set requires_grad, or load "
            "adapters by motab.models.load_with_adapters(folder, train_them=True)"
        )


def refuse_to_overwrite(output_dir: str, model: PreTrainedModel | None) -> None:
    name = getattr(model, "name_or_path", "")
    if name and Path(name).is_dir() and Path(name).resolve() == Path(output_dir).resolve():
        raise ValueError(
            f"output_dir must be another folder than those of the models, got {output_dir!r}, where "
            f"{type(model).__name__} was loaded from: training would overwrite it"
        )


def check_processes(
    args: TrainingArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    teacher_model: PreTrainedModel | None,
    *,
    writes: bool,
) -> None:
    """Refuse models that the processes of a training do not hold as it needs them; `writes`: on `Rollouts`."""
    by_zero3, by_fsdp2 = uses_zero3(accelerator), accelerator.is_fsdp2
    by_fsdp1 = getattr(accelerator.state, "fsdp_plugin", None) is not None and not by_fsdp2
    if args.n_gpu > 1:
        raise ValueError(
            f"MotabTrainer runs one process a GPU, got {args.n_gpu} GPUs in one process: start it by accelerate launch "
            f"--num_processes {args.n_gpu} -m motab.cli train ..., or set CUDA_VISIBLE_DEVICES=0"
        )
    if writes and by_fsdp1:
        raise ValueError(
            "Rollouts need DDP, version 2 of FSDP, or DeepSpeed, got models that version 1 of FSDP shards; set version "
            "in fsdp_config to 2, or write trajectories beforehand"
        )
    if by_fsdp2 and getattr(model, "is_loaded_in_8bit", False):
        raise ValueError(
            f"FSDP2 cannot shard weights in 8 bits, got {type(model).__name__} with them; load it in 4 bits, or use "
            "DDP or ZeRO-3"
        )
    if by_zero3 and not saves_whole(accelerator):
        raise ValueError(
            "ZeRO-3 must save whole models, got a file for DeepSpeed without it; set "
            "stage3_gather_16bit_weights_on_model_save to true in its zero_optimization"
        )
    if teacher_model is not None and processes_sharing(teacher_model) > 1:
        raise ValueError(
            "teacher_model must be whole, got one that the processes share; load it without shared=True, and set fsdp, "
            "which shards it"
        )
    if by_fsdp1 and teacher_model is not None:
        raise ValueError("a teacher needs version 2 of FSDP, got version 1; set version in fsdp_config to 2")

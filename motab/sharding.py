"""Models whose weights FSDP2 or DeepSpeed's ZeRO-3 shards: a process has a layer whole only while it computes it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model, parse_flag_from_env
from transformers import PreTrainedModel, TrainingArguments


def uses_fsdp(args: TrainingArguments) -> bool:
    """Whether the arguments or the launcher ask for FSDP: models then stay on the CPU until they are sharded."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def uses_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards the weights too, not only their gradients and the optimizer's state."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def saves_whole(accelerator: Accelerator) -> bool:
    """Whether a save under ZeRO-3 writes a model, not the parts of all processes alone."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    return config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save") is True


def shard_frozen(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Shard a model that is not trained, in place, as accelerate shards the one that is."""
    model.requires_grad_(False)  # accelerate makes weights that are trained float32
    state = accelerator.state
    if uses_zero3(accelerator):
        _shard_by_zero3(model, state.deepspeed_plugin)
        return
    plugin = state.fsdp_plugin
    state.fsdp_plugin = copy.copy(plugin)
    state.fsdp_plugin.transformer_cls_names_to_wrap = None  # its own layers, which may be of another class
    try:
        fsdp2_prepare_model(accelerator, model)
    finally:
        state.fsdp_plugin = plugin


def _shard_by_zero3(model: PreTrainedModel, plugin: Any) -> None:
    import deepspeed

    config = copy.deepcopy(plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    deepspeed.initialize(model=model, config=config)


def whole_copy(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of the same kind with weights of its own, which hold anything until `copy_weights_`."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Rollouts copy the weights of a transformers model that is sharded, got {type(model).__name__}; merge "
            "adapters into their model, or use DDP"
        )
    # Made by its constructor: by another way transformers would shard it under ZeRO-3.
    with torch.device(device), _default_dtype(dtype):
        copied = type(model)(copy.deepcopy(model.config))
    copied.generation_config = model.generation_config
    return copied.requires_grad_(False).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def copy_weights_(copied: PreTrainedModel, sharded: PreTrainedModel) -> None:
    """Gather the weights of a sharded model into its copy, one at a time; all processes take part."""
    for target, source in zip(_tensors(copied), _tensors(sharded), strict=True):
        if not hasattr(source, "ds_tensor"):
            source = source.detach().to(target.dtype)  # before it is sent
        with _whole(source) as whole:
            target.copy_(whole)


@torch.no_grad()
def whole_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that a save of the model holds, each whole until the next; all processes that share it take part."""
    for tensor in model.state_dict(keep_vars=True).values():
        with _whole(tensor) as whole:
            yield whole


@contextmanager
def _whole(tensor: Any) -> Iterator[torch.Tensor]:
    """The whole of a tensor of which this process may have a part."""
    if not hasattr(tensor, "ds_tensor"):
        yield tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return
    tensor.all_gather([tensor])
    try:
        yield tensor
    finally:
        tensor.partition([tensor])


def _tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether a process has only its part of the weights: by FSDP2, ZeRO-3 or tensor parallelism."""
    return any(hasattr(x, "full_tensor") or hasattr(x, "ds_tensor") for x in model.parameters())


def is_linear(head: Any) -> bool:
    """Whether a module is a linear layer and no more; FSDP2 gives what it shards a class of its own."""
    own = type(head).__bases__[-1] if _by_fsdp2(head) else type(head)
    return own is torch.nn.Linear


def whole_head(model: PreTrainedModel) -> Any:
    """The output embeddings, with their whole weights where the model is sharded, until `release_head` or the
    backward pass."""
    head = model.get_output_embeddings()
    if shards := _shards(model):
        shards.unshard()
    elif parts := _zero3_parts(head):
        parts[0].all_gather(parts)
    return head


def release_head(model: PreTrainedModel) -> None:
    """Keep only this process's part of a sharded head that has no backward pass."""
    if shards := _shards(model):
        shards.reshard()
    elif parts := _zero3_parts(model.get_output_embeddings()):
        parts[0].partition(parts)


def _zero3_parts(head: Any) -> list[Any]:
    return [parameter for parameter in head.parameters() if hasattr(parameter, "ds_tensor")]


def _shards(model: PreTrainedModel) -> Any:
    """The part of a sharded model to which the head belongs: one of its own, or the rest of the model."""
    return next((module for module in (model.get_output_embeddings(), model) if _by_fsdp2(module)), None)


def _by_fsdp2(module: Any) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)

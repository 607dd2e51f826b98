"""Checks of the arguments of truncations of key-value caches, before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from motab_kernels.arguments import is_integer


def refuse_inexact(cache: Any) -> None:
    """Raise if a layer does not hold exactly the keys and values of its tokens."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

    if getattr(cache, "offloading", False):
        raise ValueError("cache: expected one on one device, got an offloaded one: its layers move while it is changed")
    if not cache.layers:
        raise ValueError("cache: expected one that has seen a forward pass, got an empty one")
    for index, layer in enumerate(cache.layers):
        name = f"layer {index} of {type(layer).__name__}"
        # Subclasses hold more than keys and values: quantised copies, indexers, recurrent states.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer):
            raise ValueError(
                f"cache: expected layers that hold plain keys and values, got {name}, which cannot be rolled back"
            )
        if not layer.is_initialized:
            raise ValueError(f"cache: expected one that has seen a forward pass, got an empty {name}")
        if type(layer) is DynamicSlidingWindowLayer and layer.keys.shape[2] < layer.cumulative_length:
            raise ValueError(
                f"cache: expected all {layer.cumulative_length} tokens, got {name}, whose window has dropped all but "
                f"{layer.keys.shape[2]}: use a RaggedKVCache"
            )
        if layer.keys.shape[2] != cache.layers[0].keys.shape[2]:
            raise ValueError(f"cache: expected layers of one length, got {name} with {layer.keys.shape[2]} slots")


def check_tail(tail: str) -> None:
    """Raise unless ``tail`` is "keep" or "zero"."""
    if tail not in ("keep", "zero"):
        raise ValueError(f'tail: expected "keep" or "zero", got {tail!r}')


def known_to_host(new_lengths: int | Tensor, on_host: bool) -> list[int] | None:
    """The new lengths' values, if the host knows them without waiting for a device."""
    if not isinstance(new_lengths, Tensor):
        return [new_lengths]
    return new_lengths.tolist() if on_host or new_lengths.device.type == "cpu" else None


def lengths_tensor(new_lengths: int | Tensor, batch_size: int, device: torch.device) -> Tensor:
    """``new_lengths`` as (B,) int64 on the device; negative ones are refused if the host can read them."""
    if not isinstance(new_lengths, Tensor):
        if not is_integer(new_lengths):
            raise ValueError(f"new_lengths: expected an int or a tensor, got {new_lengths!r}")
        if new_lengths < 0:
            raise ValueError(f"new_lengths: expected values >= 0, got {new_lengths}")
        return torch.full((batch_size,), new_lengths, dtype=torch.int64, device=device)
    is_whole = not (new_lengths.is_floating_point() or new_lengths.is_complex() or new_lengths.dtype == torch.bool)
    if not is_whole or tuple(new_lengths.shape) != (batch_size,):
        raise ValueError(
            f"new_lengths: expected shape ({batch_size},) and an integer dtype, got {tuple(new_lengths.shape)} "
            f"{new_lengths.dtype}"
        )
    if new_lengths.device.type == "cpu" and bool((new_lengths < 0).any()):
        raise ValueError(f"new_lengths: expected values >= 0, got {new_lengths.tolist()}")
    return new_lengths.to(device=device, dtype=torch.int64)

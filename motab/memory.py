"""How many tokens the key-value caches hold: in pages, if memory cannot hold every row at its maximum length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

import motab_kernels as mk
from motab.models import processes_sharing
from motab.processes import Processes

SHARE = 0.8  # of free memory goes to keys and values, the rest to activations and logits


class Pages(NamedTuple):
    """Pages of a `RaggedKVCache`."""

    num_pages: int
    page_size: int


def page_size(max_length: int) -> int:
    """Tokens per page: large enough for one GPU program's work, small relative to a row."""
    return 256 if max_length > 4096 else 64


def pages_for(max_cached_tokens: int | None, batch_size: int, max_length: int) -> Pages | None:
    """The pages of a cache, or None if every row gets room for its maximum length.

    Raises:
        ValueError: the pages cannot hold one row.
    """
    if max_cached_tokens is None or max_cached_tokens >= batch_size * max_length:
        return None
    size = page_size(max_length)
    least = -(-max_length // size) * size
    if max_cached_tokens < least:
        raise ValueError(
            f"max_cached_tokens must be at least {least}, since the longest prompt, max_new_tokens and a block make "
            f"{max_length} tokens in pages of {size}, got {max_cached_tokens}; lower max_new_tokens, drop long prompts "
            "or free memory"
        )
    return Pages(max_cached_tokens // size, size)


def tokens_that_fit(models: Sequence[PreTrainedModel]) -> int | None:
    """Tokens whose keys and values, in all of the models, fit the free memory of their GPU; None without a GPU."""
    device = models[0].device
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    tokens = int(SHARE * free) // sum(map(bytes_of_a_token, models))
    # Processes that share a model must run the same passes.
    return min(Processes().gather(tokens)) if any(processes_sharing(model) > 1 for model in models) else tokens


def cache_dtype(model: PreTrainedModel) -> torch.dtype:
    """That of keys and values, which is the computation's."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


@torch.no_grad()
def bytes_of_a_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values per token, measured by one forward pass."""
    cache = mk.RaggedKVCache(model.config, 1, 1, device=model.device, dtype=cache_dtype(model))
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **cache.prepare(1))
    return sum(storage.nbytes for layer in cache.layers for storage in (layer.keys, layer.values))

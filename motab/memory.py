"""How many tokens the key-value caches hold: in pages, if memory cannot hold every row at its maximum length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

import motab_kernels as mk
from motab.models import processes_sharing
from motab.processes import Processes
from motab_kernels.model_attention import as_it_generates

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


def tokens_that_fit(models: Sequence[PreTrainedModel], batch_size: int) -> int | None:
    """Tokens whose keys and values, in all of the models, fit the free memory of their GPU beside the states of so many
    rows; None without a GPU."""
    device = models[0].device
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    sizes = [cache_bytes(model) for model in models]
    # States are kept up to three times: as passes change them, as they were settled, and as they were anchored.
    left = max(0, int(SHARE * free) - 3 * batch_size * sum(size.of_row for size in sizes))
    tokens = left // sum(size.of_token for size in sizes)
    # Processes that share a model must run the same passes.
    return min(Processes().gather(tokens)) if any(processes_sharing(model) > 1 for model in models) else tokens


def cache_dtype(model: PreTrainedModel) -> torch.dtype:
    """That of keys and values, which is the computation's."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


class CacheBytes(NamedTuple):
    """Bytes that the cache of a model takes."""

    of_token: int  # keys and values
    of_row: int  # states, whatever its length


@torch.no_grad()
def cache_bytes(model: PreTrainedModel) -> CacheBytes:
    """Those of a model, measured by one forward pass."""
    cache = mk.RaggedKVCache(model.config, 1, 1, device=model.device, dtype=cache_dtype(model))
    with as_it_generates(model):
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **cache.prepare(1))
    of_token = sum(storage.nbytes for layer in cache.attention_layers for storage in (layer.keys, layer.values))
    return CacheBytes(of_token, 0 if cache.states is None else cache.states.nbytes)

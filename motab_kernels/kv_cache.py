"""Key-value caches rolled back in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from motab_kernels.backend import check_backend, choose_for_storages, implementation
from motab_kernels.kv_cache_checks import check_tail, lengths_tensor, refuse_inexact

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["truncate_kv_cache_"]


@torch.no_grad()
def truncate_kv_cache_(
    cache: Cache,
    new_lengths: int | Tensor,
    attention_mask: Tensor | None = None,
    *,
    tail: str = "keep",
    max_length: int | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """Roll a transformers cache back so that row i keeps its first ``new_lengths[i]`` tokens. In place.

    The model then computes what it would compute if the dropped tokens had never been fed. Keys carry the position of
    their token, not of their slot, so moving them between slots is exact.

    - ``RaggedKVCache``: an update of ``cache.lengths`` (B,), no key or value is touched; returns None. In a model with
      recurrent states a row keeps all of its tokens, those that it had at the last truncation, those that were
      anchored, or none.
    - ``DynamicCache``: rows are end-aligned (padded on the left). Every row's kept tokens move to the end of the new
      width, ``max(new_lengths)``, and the rest is dropped. ``layer.keys`` and ``layer.values`` become views of their
      former storage; tensors taken from the cache before hold moved data afterwards.
    - ``StaticCache``: one length for all rows, counted in slots.

    Args:
        cache: the cache, changed in place in all its layers or, if anything is raised, in none.
        new_lengths: int, or (B,) of an integer dtype: real tokens to keep of each row, at most as many as it has. A
            ``RaggedKVCache`` on a GPU clamps them, because a check would make the host wait, and with recurrent states
            cuts a row further, to the next length of which there is a state. The
            ``rollback_position`` of a `BoundaryState` counts written tokens, and is -1 for a row that has not
            breached: pass ``torch.where(state.breached, begun + state.rollback_position, cache.lengths)``.
        attention_mask: (B, S), nonzero for the real tokens of a ``DynamicCache`` (or ``StaticCache``). None: all.
        tail: "keep" leaves the dead slots as they are, which is exact while they are finite, since a masked slot gets
            a probability of 0; "zero" clears them, because 0 * NaN is NaN.
        max_length: for a ``RaggedKVCache``, a bound on ``new_lengths`` that the host knows. Pass it if
            ``new_lengths`` is on a GPU, so that ``cache.visible_length`` can shrink to it.
        backend: what moves the slots of a ``DynamicCache``: "triton" (all layers in one launch), "cpu" (C++), "torch",
            or None to choose by device.

    Returns:
        The attention mask (B, max(new_lengths)) of what the cache holds now, in the dtype of the one given, else
        int64; None for a ``RaggedKVCache``. Feed it, with ones appended for new tokens, to the next forward pass,
        along with ``position_ids = (mask.cumsum(-1) - 1)[:, -num_new_tokens:]``.

    Raises:
        ValueError: a wrong argument, or a layer that cannot be rolled back exactly (recurrent or convolutional state
            outside of a ``RaggedKVCache``, or at another length, quantised or offloaded, a sliding window that has
            dropped tokens): the message names it.
    """
    from transformers.cache_utils import DynamicCache, StaticCache

    from motab_kernels.ragged_kv_cache import RaggedKVCache

    check_tail(tail)
    check_backend(backend)
    if isinstance(cache, RaggedKVCache):
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None for a RaggedKVCache, which knows its lengths, got one")
        cache.truncate_(new_lengths, tail=tail, max_length=max_length)
        return None
    if max_length is not None:
        raise ValueError(f"max_length: expected None except for a RaggedKVCache, got {type(cache).__name__}")
    if not isinstance(cache, DynamicCache | StaticCache):
        raise ValueError(f"cache: expected a RaggedKVCache, DynamicCache or StaticCache, got {type(cache).__name__}")
    refuse_inexact(cache)
    batch_size, slots = cache.layers[0].keys.shape[0], int(cache.get_seq_length())
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, slots, dtype=torch.int64, device=cache.layers[0].keys.device)
    elif tuple(attention_mask.shape) != (batch_size, slots):
        raise ValueError(f"attention_mask: expected shape {(batch_size, slots)}, got {tuple(attention_mask.shape)}")
    lengths = lengths_tensor(new_lengths, batch_size, attention_mask.device)
    if isinstance(cache, StaticCache):
        return _truncate_static_(cache, lengths, attention_mask, slots, tail)
    return _truncate_dynamic_(cache, lengths, attention_mask, slots, tail, backend)


def _truncate_dynamic_(
    cache: Any, lengths: Tensor, attention_mask: Tensor, slots: int, tail: str, backend: str | None
) -> Tensor:
    is_real = attention_mask != 0
    # The only place where the host waits for the device: the new width decides the shapes.
    has_gap = (is_real[:, :-1] & ~is_real[:, 1:]).any(-1)
    old, new, gaps = torch.stack([is_real.sum(-1), lengths, has_gap.long()]).tolist()
    if any(kept > had or kept < 0 for kept, had in zip(new, old, strict=True)):
        raise ValueError(f"new_lengths: expected at most the rows' tokens {old}, got {new}")
    if any(gaps):
        raise ValueError("attention_mask: expected all padding on the left, got a row with padding after a token")
    width = max(new)
    by_device: dict[torch.device, list[Tensor]] = {}
    for layer in cache.layers:
        by_device.setdefault(layer.keys.device, []).extend((layer.keys, layer.values))
    modules = [  # or raise, before anything is moved
        implementation("kv_cache", choose_for_storages(backend, storages), device)
        for device, storages in by_device.items()
    ]
    starts = [slots - had for had in old]
    for storages, kernels in zip(by_device.values(), modules, strict=True):
        # Tensors born in inference mode can be written only there.
        with torch.inference_mode(any(storage.is_inference() for storage in storages)):
            kernels.realign_(storages, starts, new, width, clear_padding=tail == "zero")
            increment_version(storages)  # autograd is to see that what it may have saved is moved
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :width], layer.values[:, :, :width]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = width
    kept = torch.arange(width, device=lengths.device) >= width - lengths[:, None]
    return kept.to(attention_mask.dtype)


def _truncate_static_(cache: Any, lengths: Tensor, attention_mask: Tensor, slots: int, tail: str) -> Tensor:
    new = lengths.tolist()
    if len(set(new)) > 1:
        raise ValueError(f"new_lengths: expected one length in a StaticCache, got {new}: use a RaggedKVCache")
    if new[0] > slots:
        raise ValueError(f"new_lengths: expected at most {slots}, got {new[0]}")
    for layer in cache.layers:
        if tail == "zero":
            layer.keys[:, :, new[0] : slots].zero_()
            layer.values[:, :, new[0] : slots].zero_()
        layer.cumulative_length.fill_(new[0])
    return attention_mask[:, : new[0]]

"""`ragged_attention` as the attention of a transformers model that runs on a `RaggedKVCache`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from motab_kernels.attention import ragged_attention
from motab_kernels.backend import choose_backend

#: Its name in transformers: `model.set_attn_implementation(RAGGED_ATTENTION)`.
RAGGED_ATTENTION = "motab_ragged"


class ForwardPass(NamedTuple):
    """One forward pass: which rows it feeds, the slots their new tokens take and how many slots it can see."""

    rows: Tensor | None  # (b,), None for all rows in order
    slots: Tensor  # (b, q)
    places: Tensor  # (b, q) or (b, 1): the row or page of the storage that each token goes to
    offsets: Tensor  # (b, q): the slot there
    page_table: Tensor | None  # (b, n), None where each row lies in one piece
    visible_length: int
    windows: list[int | None] | None  # of each layer, for `ragged_attention`; None: the attention has masks


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    ragged_step: ForwardPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`ragged_attention` as transformers calls an attention: (b, q, H_q, D)."""
    if ragged_step is None or ragged_step.windows is None:
        raise ValueError(
            f'ragged_step: expected what RaggedKVCache.prepare gives for attention "{RAGGED_ATTENTION}", got none: '
            "call the model with it; load a model that does not pass it on to its attention with "
            'attn_implementation="eager"'
        )
    unknown = [name for name, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    if unknown:
        raise ValueError(
            f'attention: expected arguments that "{RAGGED_ATTENTION}" knows, got {", ".join(unknown)} of '
            f'{type(module).__name__}: load the model with attn_implementation="eager"'
        )
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(key.dtype)
    out = ragged_attention(
        query,
        key,
        value,
        ragged_step.slots[:, 0],
        rows=ragged_step.rows if ragged_step.page_table is None else None,
        page_table=ragged_step.page_table,
        scale=scaling,
        window=ragged_step.windows[module.layer_idx],  # type: ignore[index]
        softcap=softcap,
        sinks=s_aux,
        visible_length=ragged_step.visible_length,
    )
    return out.transpose(1, 2), None


AttentionInterface.register(RAGGED_ATTENTION, _attend)


def takes_ragged_attention(model: PreTrainedModel) -> bool:
    """Whether a model can run on `ragged_attention`, and faster: its attention can be replaced, keys and values have
    one size, and there are kernels for its dtype and device. "eager" counts as the user's choice, and is kept."""
    config = model.config.get_text_config(decoder=True)
    return (
        model._supports_attention_backend
        and config._attn_implementation != "eager"
        and getattr(config, "kv_lora_rank", None) is None  # latent attention: values are narrower than keys
        and choose_backend(None, torch.empty(0, dtype=model.dtype, device=model.device)) != "torch"
    )


def as_it_generates(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The model's attention is `ragged_attention` until the block ends, if it takes that; else its own."""
    return on_ragged_attention(model) if takes_ragged_attention(model) else nullcontext()


def on_ragged_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The model's attention is `ragged_attention` until the block ends."""
    return on_attention(model, RAGGED_ATTENTION)


@contextmanager
def on_attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model's attention is the implementation of this name until the block ends."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before

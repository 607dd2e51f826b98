"""One layer of a `RaggedKVCache`, and which layers a model has.

B rows of the cache, b rows of one forward pass, H heads, S slots, D head size, q new tokens; P pages.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from motab_kernels.model_attention import Step
from motab_kernels.page_table import PageTable


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, H, S, D) or (P + 1, H, S, D), allocated when the first ones arrive."""

    is_croppable = True

    def __init__(self, batch_size: int, max_length: int, is_sliding: bool, pages: PageTable | None) -> None:
        super().__init__()
        self.max_length = max_length
        self.is_sliding = is_sliding
        self.pages = pages
        self.pieces, self.slots = (batch_size, max_length) if pages is None else (pages.num_pages + 1, pages.page_size)

    # The cache answers for sizes and positions, which are the same for every layer.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("ask the cache: RaggedKVCache.get_mask_sizes")

    def get_seq_length(self) -> int:
        raise NotImplementedError("ask the cache: RaggedKVCache.get_seq_length")

    def get_max_length(self) -> int:
        return self.max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                at_one_address(
                    torch.zeros(
                        (self.pieces, states.shape[1], self.slots, states.shape[3]),
                        dtype=states.dtype,
                        device=states.device,
                    )
                )
                for states in (key_states, value_states)
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states, step), self._write(self.values, value_states, step)

    def _write(self, storage: Tensor, states: Tensor, step: Step) -> Tensor:
        """Write ``states`` (b, H, q, D) to the step's slots. Return the slots that the step sees, (b, H,
        visible_length, D), or the storage for an attention that finds rows and slots itself."""
        storage.transpose(1, 2)[step.places, step.offsets] = states.transpose(1, 2)
        if step.windows is not None:
            return storage
        if self.pages is not None:
            assert step.page_table is not None
            return self.pages.in_one_piece(storage, step.page_table, step.visible_length)
        visible = storage[:, :, : step.visible_length]
        return visible if step.rows is None else visible.index_select(0, step.rows)


def at_one_address(x: Tensor) -> Tensor:
    """Tell `torch.compile` that a tensor keeps its address: otherwise CUDA graphs do not write to it in place."""
    if x.is_cuda and not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x


#: Models whose attention needs more than keys, values and a mask, or that keep none of these.
_UNFIT = {
    "bloom": "adds a bias by distance (ALiBi)",
    "mpt": "adds a bias by distance (ALiBi)",
    "gpt_neo": "counts the windows of its local attention from the end of the cache",
    "openai-gpt": "takes no cache",
    "rwkv": "keeps a recurrent state",
}


def check_positions(config: Any, max_length: int) -> None:
    """Refuse models whose keys or masks depend on more than a token's own position."""
    unfit = "adds a bias by distance (ALiBi)" if getattr(config, "alibi", False) else _UNFIT.get(config.model_type)
    if unfit is not None:
        raise ValueError(f"config: expected attention by keys and a mask, got {config.model_type!r}, which {unfit}")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # of all layers, or of each kind
        if isinstance(parameters, Mapping) and parameters.get("rope_type") == "longrope":
            short = parameters["original_max_position_embeddings"]
            if max_length > short:
                raise ValueError(
                    f"max_length: expected at most {short} for {config.model_type!r}, got {max_length}: its rotary "
                    "embeddings (longrope) change for all rows beyond that, and cached keys keep the former ones; use "
                    "shorter prompts and fewer new tokens"
                )


def layer_types(config: Any) -> list[str]:
    """Each layer's kind of attention, "full_attention" or "sliding_attention"; any other is refused by name."""
    num_layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        if getattr(config, "num_attention_heads", None) is None:
            kind = repr(config.model_type)
            raise ValueError(f"config: expected attention layers, got {kind}: layer 0 keeps a recurrent state")
        sliding = getattr(config, "sliding_window", None) is not None and _looks_at_a_window(config)
        kinds = ["sliding_attention" if sliding else "full_attention"] * num_layers
    sharing = getattr(config, "kv_sharing_modes", None) or [None] * num_layers
    first_shared = num_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    for index, layer_type in enumerate(kinds):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f'config: expected "full_attention" or "sliding_attention", got layer {index} of {layer_type!r}, '
                "whose state cannot be rolled back by a length"
            )
        if index >= first_shared or sharing[index] == "reuse":
            raise ValueError(f"config: expected layers with their own keys and values, got layer {index} sharing them")
    return list(kinds)


def _looks_at_a_window(config: Any) -> bool:
    """Whether the model's code uses a sliding window: the config of a Llama has a "sliding_window" too, but the model
    attends to all tokens. True if the code cannot be found."""
    home = type(config).__module__
    if "configuration_" not in home:
        return True
    try:
        code = inspect.getsource(importlib.import_module(home.replace("configuration_", "modeling_")))
    except (ImportError, OSError):
        return True
    return "sliding_window" in code

"""What a `RaggedKVCache` refuses: models that it does not fit, and rows of a forward pass.

B rows of the cache, b rows of one forward pass.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from motab_kernels.page_table import PageTable

#: Kinds of layers, by their names in transformers: with keys and values, with states (one kind has both), with neither.
ATTENTION = ("full_attention", "sliding_attention", "hybrid")
RECURRENT = ("linear_attention", "conv", "hybrid")
STATELESS = ("moe", "mlp")
#: Models whose attention needs more than keys, values and a mask, or that keep none of these.
_UNFIT = {
    "bloom": "adds a bias by distance (ALiBi)",
    "mpt": "adds a bias by distance (ALiBi)",
    "gpt_neo": "counts the windows of its local attention from the end of the cache",
    **dict.fromkeys(
        ("inkling_text", "inkling2_text", "inkling2_loop_text"),
        "counts distances from the end of the cache, for all rows",
    ),
    "openai-gpt": "takes no cache",
    "rwkv": "keeps a recurrent state",
    "minimax": "keeps its states in a cache of its own",
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
    """Each layer's kind, of those in `ATTENTION`, `RECURRENT` and `STATELESS`; any other is refused by name."""
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
        if layer_type not in (*ATTENTION, *RECURRENT, *STATELESS):
            raise ValueError(
                f"config: expected layers of {', '.join((*ATTENTION, *RECURRENT))}, got layer {index} of "
                f"{layer_type!r}, whose cache cannot be rolled back"
            )
        if layer_type in RECURRENT and not hasattr(Cache, "get_recurrent_state"):
            raise ValueError(
                f"config: expected layers without recurrent states, got layer {index} of {layer_type!r}: they can be "
                "rolled back with transformers 5.24 or newer"
            )
        if index >= first_shared or sharing[index] == "reuse":
            raise ValueError(f"config: expected layers with their own keys and values, got layer {index} sharing them")
    if not set(kinds) & set(ATTENTION):
        raise ValueError(f"config: expected at least one layer with attention, got {sorted(set(kinds))} alone")
    return list(kinds)


def keeps_states(config: Any) -> bool:
    """Whether a model has layers with recurrent or convolutional states."""
    return not set(RECURRENT).isdisjoint(layer_types(config.get_text_config(decoder=True)))


def _looks_at_a_window(config: Any) -> bool:
    """Whether the model's code uses a sliding window: the config of a Llama has a "sliding_window" too, but the model
    attends to all tokens. What cannot be found out is refused."""
    home = type(config).__module__
    if "configuration_" in home:
        with suppress(ImportError, OSError):
            return "sliding_window" in inspect.getsource(
                importlib.import_module(home.replace("configuration_", "modeling_"))
            )
    raise ValueError(
        f"config: expected layer_types, or the model's code beside {home}, got {config.model_type!r} with neither and "
        f"sliding_window {config.sliding_window}; set layer_types to sliding_attention or full_attention for each "
        "layer, or sliding_window to None where the model attends to all tokens"
    )


def check_rows(rows: Tensor | None, batch_size: int, device: torch.device) -> None:
    """Raise unless `rows` is None or (b,) rows of the cache, of which a GPU's values are not looked at."""
    if rows is None:
        return
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1 or rows.device != device:
        got = f"{rows.dtype} {tuple(rows.shape)} on {rows.device}" if isinstance(rows, Tensor) else repr(rows)
        raise ValueError(f"rows: expected None or (b,) int64 on {device}, got {got}")
    if rows.device.type != "cpu":  # looking would make the host wait
        return
    given = rows.tolist()
    if not given or len(set(given)) < len(given) or min(given) < 0 or max(given) >= batch_size:
        raise ValueError(f"rows: expected distinct ones within [0, {batch_size}), got {given}")


def check_reserved(pages: PageTable, rows: Tensor | None, lengths: Tensor, uniform_length: int | None) -> None:
    """Raise if rows lack pages for the tokens that they hold, (b,), as far as the host knows: on a GPU only where all
    rows of the cache have one length."""
    if not any(pages.of_row):
        raise ValueError("pages: expected rows with pages to write to, got none: call reserve_ first")
    B = len(pages.of_row)
    if lengths.device.type == "cpu":
        pages.check_room(lengths.tolist(), range(B) if rows is None else rows.tolist())
    elif uniform_length is not None:
        pages.check_room([uniform_length] * B, range(B))

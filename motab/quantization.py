"""Models whose weights have 4 or 8 bits: quantised as they are loaded, by bitsandbytes, or before they were saved."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

BITS = (4, 8)


def loading(name_or_path: str, bits: int | None) -> dict[str, Any]:
    """What `from_pretrained` is told, so that it quantises the linear layers but the head: to 4 bits (nf4) or 8.

    Raises:
        ValueError: another number of bits, weights that are quantised already, or bitsandbytes is not installed.
    """
    if bits is None:
        return {}
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, or None for whole weights, got {bits!r}")
    if found := saved_method(name_or_path):
        raise ValueError(
            f"{name_or_path!r} is quantised already (by {found}), got {bits} bits; leave these out, it loads as it is"
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError("models in 4 or 8 bits need the package bitsandbytes: pip install bitsandbytes")
    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}


def saved_method(name_or_path: str) -> str | None:
    """How the weights of a folder, or of a place on the hub, were quantised before they were saved; of adapters, those
    below. None: not at all, or there is no such model."""
    try:
        if adapters := find_adapter_config_file(name_or_path):
            name_or_path = json.loads(Path(adapters).read_text(encoding="utf-8"))["base_model_name_or_path"]
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError):
        return None
    # A model that sees images too has it beside its text config, or in it.
    parts = (config, config.get_text_config(decoder=True))
    found = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
    return None if found is None else str(found.get("quant_method", "an unknown method"))


def method(model: nn.Module) -> str | None:
    """How a model's weights are quantised, None if they are not."""
    quantizer = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else str(quantizer.quantization_config.quant_method.value)


def is_trained_by_adapters_alone(model: PreTrainedModel) -> bool:
    """Whether a model's own weights are too coarse to be trained."""
    return method(model) is not None and not model.hf_quantizer.is_qat_trainable


def settle(model: PreTrainedModel, bits: int | None) -> None:
    """Correct what bitsandbytes does with a model that has just been loaded.

    Raises:
        ValueError: on a CPU, 4-bit weights that it reads wrongly there.
    """
    if method(model) != "bitsandbytes":
        return
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)
    for name, module in model.named_modules():
        if not hasattr(module, "compute_dtype"):  # of 4-bit layers alone
            continue
        if bits is not None:
            module.compute_dtype = model.dtype  # else float32, whatever the hidden states have
        # On a CPU that has bfloat16, the first pass would rearrange the weights in place: none after it has a gradient,
        # and a look at the state dict leaves other weights behind (bitsandbytes 0.50).
        module.support_avx512bf16_for_cpu = False
        size = module.weight.quant_state.blocksize
        if model.device.type == "cpu" and module.in_features % size:  # it takes no block to span two rows
            raise ValueError(
                f"bitsandbytes on a CPU needs 4-bit layers with a multiple of {size} inputs, got {module.in_features} "
                f"in {name} of {type(model).__name__}; take 8 bits, or a GPU"
            )


def _is_no_cast(record: logging.LogRecord) -> bool:
    """Not what an 8-bit layer logs at each pass of other inputs than float16."""
    return "inputs will be cast" not in record.msg

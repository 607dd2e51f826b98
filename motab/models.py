"""Loading models and the tokenizer that a student and its teacher share."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from motab import quantization
from motab.processes import process_state

DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dtype_name(name: str) -> str:
    """The full name of a dtype, which may be given as bf16, fp16 or fp32.

    Raises:
        ValueError: none of `DTYPES`.
    """
    full = _SHORT.get(name, name)
    if full not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, or {', '.join(_SHORT)} for short, got {name!r}")
    return full


def load_model(
    name_or_path: str,
    dtype: str = "auto",
    *,
    bits: int | None = None,
    shared: bool = False,
    on_cpu: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, on the accelerator if there is one, or on the CPU; each process has
    its own, or all share one (tensor parallelism).

    Args:
        dtype: of the weights, and of the computation with those in few bits; "auto": as saved.
        bits: 4 (nf4) or 8: bitsandbytes quantises the linear layers but the head. A checkpoint that is quantised
            already, in whatever way, needs nothing but the package that its method takes.

    Raises:
        ValueError: not a model, one that cannot be shared or has no such attention; an unknown dtype; bits of a
            model that is quantised already, or without bitsandbytes.
    """
    dtype = dtype_name(dtype)
    device = process_state().device
    options: dict[str, Any] = {"distributed_config": DistributedConfig(tp_plan="auto")} if shared else {}
    options |= quantization.loading(name_or_path, bits)
    if shared and (bits is not None or quantization.saved_method(name_or_path) == "bitsandbytes"):
        raise ValueError(
            f"weights that bitsandbytes quantises cannot be split among processes, got {name_or_path!r} to be shared; "
            "load it whole in each, or share it with the weights that it was made from"
        )
    with_attention = ""
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
        with_attention = f" to be loaded with attn_implementation {attn_implementation!r}"
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **options)
    except ImportError as error:  # of an attention or a quantisation
        raise ValueError(
            f"a package is missing for {name_or_path!r} as a language model{with_attention}: {_short(error)}"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name_or_path!r} is not a causal language model{with_attention} (expected a hub name or a "
            f"folder with config.json and weights): {_short(error)}"
        ) from error
    quantization.settle(model, bits)
    if getattr(model, "_hf_peft_config_loaded", False):
        _take_generation_config(model, name_or_path)
        model.name_or_path = name_or_path  # not that of the model below
    on_its_devices = on_cpu or processes_sharing(model) > 1
    return model.eval() if on_its_devices else model.to(device).eval()


def processes_sharing(model: nn.Module) -> int:
    """How many processes hold this model together (tensor-parallel); 1: each has its own."""
    return getattr(model, "tp_size", None) or 1


def _short(error: Exception) -> str:
    """What an error says, without the list of all models that transformers has."""
    text = str(error)
    return text if len(text) <= 500 else text[:500] + "..."


def load_with_adapters(folder: str, dtype: str = "auto", *, train_them: bool, **options: Any) -> PreTrainedModel:
    """A model with the adapters of a folder, as `load_model` takes it, to be trained on: with `train_them` the adapters
    go on, else they are merged into the weights, which are trained.

    Raises:
        ValueError: peft is not installed, adapters to be merged into weights in few bits, or what `load_model` refuses.
    """
    peft = _peft()
    base = load_model(peft.PeftConfig.from_pretrained(folder).base_model_name_or_path, dtype, **options)
    if not train_them and quantization.is_trained_by_adapters_alone(base):
        raise ValueError(
            f"weights in few bits ({quantization.method(base)}) are too coarse for the adapters of {folder!r} to be "
            "merged into them and trained; go on with the adapters (--use_peft, train_them=True)"
        )
    _take_generation_config(base, folder)
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=train_them)
    model = model if train_them else model.merge_and_unload().requires_grad_(True)  # peft has frozen them
    model.name_or_path = folder
    return model


def _take_generation_config(model: PreTrainedModel, folder: str) -> None:
    """That of adapters, which names other end tokens than the model below, if it was saved beside them."""
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder)


def holds_adapters(name_or_path: str) -> bool:
    """Whether a model's folder, or its place on the hub, holds adapters to another model."""
    return find_adapter_config_file(name_or_path) is not None


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("adapters (LoRA) need the package peft: pip install peft") from error
    return peft


def with_lora(
    model: PreTrainedModel, r: int, alpha: int, dropout: float, target_modules: str | list[str]
) -> PreTrainedModel:
    """The model with low-rank adapters (LoRA), which alone are trained and saved; `load_model` loads them with it.

    Raises:
        ValueError: peft is not installed, settings that it refuses, or a model that has adapters already, which would
            not be saved.
    """
    peft = _peft()
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{type(model).__name__} has adapters already, which would be lost: load it with load_with_adapters"
        )
    try:
        config = peft.LoraConfig(
            r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"LoRA with r={r} on {target_modules} does not fit {type(model).__name__}: {error}") from error


def load_tokenizer(*names_or_paths: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the first model, after a check that the others' are the same.

    Raises:
        ValueError: there is no tokenizer, or the vocabularies differ.
    """
    tokenizers = []
    for name in names_or_paths:
        try:
            tokenizers.append(AutoTokenizer.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer found at {name}: {_short(error)}") from error
    first = tokenizers[0]
    for name, other in zip(names_or_paths[1:], tokenizers[1:], strict=True):
        if first.get_vocab() != other.get_vocab():
            token = min(set(first.get_vocab().items()) ^ set(other.get_vocab().items()))[0]
            raise ValueError(
                f"student and teacher must share one tokenizer, but {names_or_paths[0]!r} has {len(first)} tokens and "
                f"{name!r} {len(other)}; they differ in {token!r}, for example"
            )
    return first

"""Checks of the arguments of `sample_from_logits`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from motab_kernels.arguments import DIVISORS, check_place, check_whole, is_integer, is_number
from motab_kernels.tensors import DTYPES


class Setting(NamedTuple):
    name: str
    expected: str
    is_kind: Callable[[object], bool]
    holds: Callable[[Any], Any]  # whether a number is in range, or each of a tensor
    dtypes: tuple[torch.dtype, torch.dtype]  # of a tensor


LEAST, MOST = DIVISORS  # beyond them a reciprocal leaves float32's range
TEMPERATURES = f"0 for the likeliest token, or a number from {LEAST:g} to {MOST:g}"
SHARES, WEIGHTS = "a number in (0, 1], where 1 keeps all tokens", "a number in [0, 1], where 0 keeps all tokens"
FLOATS, INTEGERS = (torch.float32, torch.float64), (torch.int32, torch.int64)
SETTINGS = (
    Setting("temperature", TEMPERATURES, is_number, lambda x: (x == 0) | ((x >= LEAST) & (x <= MOST)), FLOATS),
    Setting("top_k", "an integer >= 0", is_integer, lambda x: x >= 0, INTEGERS),
    Setting("top_p", SHARES, is_number, lambda x: (x > 0) & (x <= 1), FLOATS),
    Setting("min_p", WEIGHTS, is_number, lambda x: (x >= 0) & (x <= 1), FLOATS),
)


def check_settings(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Numbers."""
    for x, (name, expected, is_kind, holds, _) in zip((temperature, top_k, top_p, min_p), SETTINGS, strict=True):
        if not is_kind(x) or not holds(x):
            raise ValueError(f"{name}: expected {expected}, got {x!r}")


def check_row_settings(logits: Tensor, *settings: Any) -> None:
    """Numbers and tensors, in the order of `SETTINGS`; of tensors not the values."""
    check_settings(*(1 if isinstance(x, Tensor) else x for x in settings))  # 1 is in every range
    for x, setting in zip(settings, SETTINGS, strict=True):
        if isinstance(x, Tensor):
            if x.dtype not in setting.dtypes:
                expected = " or ".join(map(str, setting.dtypes))
                raise ValueError(f"{setting.name}: expected a number or a tensor of {expected}, got {x.dtype}")
            check_place(setting.name, x, logits.shape[0], logits.device)


def check_tensors(logits: Tensor, uniforms: Tensor) -> None:
    check_whole("logits", logits)
    check_whole("uniforms", uniforms)
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits: expected float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (B, V) or (B, T, V) with V > 0, got {tuple(logits.shape)}")
    shape = logits.shape[:-1]
    if uniforms.shape != shape or uniforms.dtype != torch.float64 or uniforms.device != logits.device:
        got = f"{tuple(uniforms.shape)} {uniforms.dtype} on {uniforms.device}"
        raise ValueError(f"uniforms: expected {tuple(shape)} float64 on {logits.device}, got {got}")


def check_values(uniforms: Tensor, *settings: float | Tensor) -> None:
    """On the CPU only: elsewhere the host would have to wait."""
    if not ((uniforms >= 0) & (uniforms < 1)).all():
        raise ValueError(f"uniforms: expected values in [0, 1), got {uniforms.tolist()}")
    for x, setting in zip(settings, SETTINGS, strict=True):
        if isinstance(x, Tensor) and not setting.holds(x).all():
            raise ValueError(f"{setting.name}: expected {setting.expected}, got {x.tolist()}")

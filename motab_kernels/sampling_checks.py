"""Checks of the arguments of `sample_from_logits`."""

from __future__ import annotations

import torch
from torch import Tensor

from motab_kernels.arguments import DIVISORS, check_count, is_number
from motab_kernels.tensors import DTYPES


def check_settings(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    least, most = DIVISORS  # beyond them a reciprocal leaves float32's range
    if not is_number(temperature) or not (temperature == 0 or least <= temperature <= most):
        expected = f"0 for the likeliest token, or a number from {least:g} to {most:g}"
        raise ValueError(f"temperature: expected {expected}, got {temperature!r}")
    check_count("top_k", top_k, minimum=0)
    if not is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], where 1 keeps all tokens, got {top_p!r}")
    if not is_number(min_p) or not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], where 0 keeps all tokens, got {min_p!r}")


def check_tensors(logits: Tensor, uniforms: Tensor) -> None:
    if logits.dtype not in DTYPES or logits.layout != torch.strided:
        expected = "a dense tensor of float32, bfloat16, float16 or float64"
        raise ValueError(f"logits: expected {expected}, got {logits.dtype}, {logits.layout}")
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (B, V) or (B, T, V) with V > 0, got {tuple(logits.shape)}")
    shape = logits.shape[:-1]
    if uniforms.shape != shape or uniforms.dtype != torch.float64 or uniforms.device != logits.device:
        got = f"{tuple(uniforms.shape)} {uniforms.dtype} on {uniforms.device}"
        raise ValueError(f"uniforms: expected {tuple(shape)} float64 on {logits.device}, got {got}")


def check_values(uniforms: Tensor) -> None:
    """On the CPU only: elsewhere the host would have to wait."""
    if not ((uniforms >= 0) & (uniforms < 1)).all():
        raise ValueError(f"uniforms: expected values in [0, 1), got {uniforms.tolist()}")

"""Conversions that peers leave to the caller or to autocast, and our ops need."""

from __future__ import annotations

from torch import Tensor

from motab_kernels.linear_head import as_autocast
from motab_kernels.tensors import wide_dtype


def valid(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Labels to a mask."""
    return None if labels is None else labels != ignore_index


def wide(x: Tensor) -> Tensor:
    """At least float32: a logarithm rounded to bfloat16 makes the probability some per cent wrong."""
    return x.to(wide_dtype(x))


def head_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias in one dtype: autocast's where it is on, else the hidden states' own."""
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)

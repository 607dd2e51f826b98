"""`sample_from_logits` in C++: one call, on as many threads as torch uses."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from motab_kernels.cpu.arguments import logits as logits_arguments
from motab_kernels.cpu.library import kernels
from motab_kernels.sampling_checks import check_values

CALL = struct.Struct("12q4d")  # `SamplingCall` in sampling.cpp
NUMBERS = frozenset((float, int))
NO_MEMORY, OUT_OF_RANGE = 1, 2


def sample_from_logits(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    tokens: Tensor,
    valid: Tensor,
) -> None:
    """Write `tokens` and `valid`, (B,) or (B, T) contiguous, from logits (..., V) contiguous in V.

    A setting is a number or a tensor (B,).
    """
    # These names keep new tensors alive until the call is over.
    uniforms = uniforms.contiguous()
    settings, rows = (temperature, top_k, top_p, min_p), None
    if not NUMBERS.issuperset(map(type, settings)):
        rows = torch.empty(len(logits), len(settings), dtype=torch.float64)
        for i, x in enumerate(settings):
            rows[:, i] = x
        settings = 0, 0, 0, 0  # not read
    call = CALL.pack(
        logits.shape[0],
        logits.shape[1] if logits.dim() == 3 else 1,
        logits.shape[-1],
        torch.get_num_threads(),
        *logits_arguments(logits),
        *(x.data_ptr() for x in (uniforms, tokens, valid)),
        0 if rows is None else rows.data_ptr(),
        *settings,
    )
    code = kernels().motab_sample_from_logits(call)
    if code == NO_MEMORY:
        raise MemoryError("sample_from_logits: no memory for its candidates")
    if code == OUT_OF_RANGE:
        check_values(uniforms, temperature, top_k, top_p, min_p)

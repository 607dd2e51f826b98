"""`sample_from_logits` in C++: one call, on as many threads as torch uses."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from motab_kernels.cpu.arguments import logits as logits_arguments
from motab_kernels.cpu.library import kernels
from motab_kernels.sampling_checks import check_values

CALL = struct.Struct("12q3d")  # `SamplingCall` in sampling.cpp
NO_MEMORY, OUT_OF_RANGE = 1, 2


def sample_from_logits(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    tokens: Tensor,
    valid: Tensor,
) -> None:
    """Write `tokens` and `valid`, (B,) or (B, T) contiguous, from logits (..., V) contiguous in V."""
    uniforms = uniforms.contiguous()  # this name keeps a new tensor alive until the call is over
    call = CALL.pack(
        logits.shape[0],
        logits.shape[1] if logits.dim() == 3 else 1,
        logits.shape[-1],
        torch.get_num_threads(),
        *logits_arguments(logits),
        *(x.data_ptr() for x in (uniforms, tokens, valid)),
        top_k,
        temperature,
        top_p,
        min_p,
    )
    code = kernels().motab_sample_from_logits(call)
    if code == NO_MEMORY:
        raise MemoryError("sample_from_logits: no memory for its candidates")
    if code == OUT_OF_RANGE:
        check_values(uniforms)

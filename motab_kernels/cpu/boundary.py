"""`fused_kl_boundary` in C++: one call, on as many threads as torch uses. B rows, T tokens, V shared vocabulary."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from motab_kernels.boundaries import SCORES, Criterion
from motab_kernels.cpu.arguments import logits, parameter, widened
from motab_kernels.cpu.library import kernels

CALL = struct.Struct("44q")  # `BoundaryCall` in boundary.cpp
NO_MEMORY = 1


def _strided(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1) if x.dim() == 2 else 0)


def fused_kl_boundary(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    step_ends: Tensor | None,
    temperature: Tensor | None,
    doubt: Tensor | None,
    criterion: Criterion,
    state: list[Tensor],
    out: list[Tensor],
) -> bool:
    """Write `out`, (B, T) contiguous each, from (B, T, V) logits contiguous in V; update the tensors of `state`, which
    is empty where no state is kept. T may be absent: it is 1.

    Returns False where a token or a temperature is out of range; nothing has been changed then.

    `doubt` (B, T) contiguous float32, if given, replaces the teacher's entropy in the threshold.
    """
    # Kept alive until the call is over.
    parameters = [widened(x) for x in (temperature, criterion.scale, criterion.theta)]
    call = CALL.pack(
        student_logits.shape[0],
        student_logits.shape[1] if student_logits.dim() == 3 else 1,
        student_logits.shape[-1],
        torch.get_num_threads(),
        *logits(student_logits),
        *logits(teacher_logits),
        *_strided(token_ids),
        *_strided(step_ends),
        *(number for x in parameters for number in parameter(x)),
        0 if doubt is None else doubt.data_ptr(),
        SCORES.index(criterion.score),
        criterion.window,
        *([x.data_ptr() for x in state] or (0, 0, 0)),
        *(x.data_ptr() for x in out),
    )
    code = kernels().motab_fused_kl_boundary(call)
    if code == NO_MEMORY:
        raise MemoryError("fused_kl_boundary: no memory for its partial sums")
    return code == 0

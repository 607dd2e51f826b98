"""`fused_kl_boundary` on Triton: one launch reads the logits, the last decides, with one program per row.

That combines the row's splits too where it can do so at once, as of one token; else a launch between does so for all
positions at a time.

B rows, T tokens, V shared vocabulary, S splits of it. No atomics, and the host does not wait. The formulas
are in `boundary_partial`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from motab_kernels.boundaries import Criterion
from motab_kernels.gpu import NVIDIA, launch, launched_on, row_stride
from motab_kernels.gpu.boundary_combine import combine_kernel
from motab_kernels.gpu.boundary_decide import decide_kernel
from motab_kernels.gpu.boundary_partial import partial_kernel, rows
from motab_kernels.gpu.tuned import tuned


class Settings(NamedTuple):
    """How the vocabulary is divided. A tile is `lanes` x `per_lane` columns and a split `tiles` tiles.

    A tile has at least two columns for each thread, which are made float32 together.
    """

    lanes: int = 32  # one a thread
    per_lane: int = 16  # of a lane, which share one rescaling; 128 bits of them are contiguous
    tiles: int = 4  # 8 have a tenth fewer instructions, but would take nearly twice as long for one position
    num_warps: int = 1  # whose lanes need no barrier
    sums: int = 128  # (position, split) pairs that a warp combines at a time; 256 spill


DEFAULT = Settings()
HIP = Settings(lanes=64)  # a wave has 64 threads
ROWS = rows()
WALKED = 32  # positions whose statistics the deciding warp reads at a time, one a thread


def settings_for(device: torch.device) -> Settings:
    return tuned("boundary", device, DEFAULT, HIP)


def workspace_shape(positions: int, V: int, settings: Settings) -> tuple[int, int, int]:
    """(positions, sums, splits) float32. The splits depend on V only, so that a row's sums are independent of its
    batch."""
    # triton.cdiv would take 2 us of each call.
    return positions, ROWS, -(-V // (settings.lanes * settings.per_lane * settings.tiles))


@functools.lru_cache(maxsize=256)
def division(V: int, itemsize: int, settings: Settings) -> dict[str, int]:
    """Arguments of the kernels that depend on the vocabulary and the logits' dtype alone."""
    S = workspace_shape(1, V, settings)[2]
    S_BLOCK = triton.next_power_of_2(S)
    vector = 16 // itemsize  # 128 bits
    return {
        "V": V,
        "S": S,
        "SPLIT": settings.lanes * settings.per_lane * settings.tiles,
        "GROUPS": settings.per_lane // vector,
        "FAST": NVIDIA,
        "LANES": settings.lanes,
        "VECTOR": vector,
        "TILES": settings.tiles,
        "S_BLOCK": S_BLOCK,
        # How many positions a warp combines at a time, at most one a thread. By V alone, not T: the layout of a sum,
        # and so its last bit, must not depend on how a text is cut.
        "T_BLOCK": max(1, min(32, settings.sums // S_BLOCK)),
    }


def fused_kl_boundary(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    step_ends: Tensor | None,
    temperature: Tensor | None,
    doubt: Tensor | None,
    criterion: Criterion,
    state: tuple[Tensor, Tensor, Tensor],
    out: list[Tensor],
    workspace: Tensor,
    settings: Settings,
) -> None:
    """Write `out`, contiguous each, from (B, T, V) or (B, V) logits contiguous in V; update `state`'s tensors.

    `doubt`, if given, contiguous, replaces the teacher's entropy in the threshold.
    """
    B, *block, V = student_logits.shape
    T = block[0] if block else 1
    itemsize = max(student_logits.element_size(), teacher_logits.element_size())
    # An absent tensor's pointer is never read; any other stands in for it.
    absent = token_ids
    arguments: dict[str, Any] = {
        **division(V, itemsize, settings),
        "T": T,
        "student_ptr": student_logits,
        "student_stride_b": student_logits.stride(0),
        "student_stride_t": student_logits.stride(1) if block else 0,
        "teacher_ptr": teacher_logits,
        "teacher_stride_b": teacher_logits.stride(0),
        "teacher_stride_t": teacher_logits.stride(1) if block else 0,
        "token_ptr": token_ids,
        "token_stride_b": token_ids.stride(0),
        "token_stride_t": token_ids.stride(1) if block else 0,
        "HAS_TEMPERATURE": temperature is not None,
        "temperature_ptr": absent if temperature is None else temperature,
        "temperature_stride_b": row_stride(temperature),
        "partial_ptr": workspace,
        "HAS_ENDS": step_ends is not None,
        "ends_ptr": absent if step_ends is None else step_ends,
        "ends_stride_b": 0 if step_ends is None else step_ends.stride(0),
        "ends_stride_t": step_ends.stride(1) if block and step_ends is not None else 0,
        "SCORE": criterion.score,
        "scale_ptr": criterion.scale,
        "scale_stride_b": row_stride(criterion.scale),
        "HAS_THETA": criterion.theta is not None,
        "theta_ptr": absent if criterion.theta is None else criterion.theta,
        "theta_stride_b": row_stride(criterion.theta),
        "HAS_DOUBT": doubt is not None,
        "doubt_ptr": absent if doubt is None else doubt,
        "WINDOW": criterion.window,
        "WINDOW_BLOCK": triton.next_power_of_2(criterion.window) if criterion.window else 1,
        "counters_ptr": state[0],
        "scores_ptr": state[1],
        "history_ptr": state[2],
        **dict(zip(OUTPUT_POINTERS, out, strict=True)),
    }
    T_BLOCK = arguments["T_BLOCK"]
    combines = T_BLOCK >= T
    arguments |= {"COMBINE": combines, "BLOCK": T_BLOCK if combines else WALKED}
    with launched_on(student_logits.device):
        launch(partial_kernel, (B * T, arguments["S"]), arguments, num_warps=settings.num_warps)
        if not combines:
            launch(combine_kernel, (B * -(-T // T_BLOCK),), arguments, num_warps=1)
        launch(decide_kernel, (B,), arguments, num_warps=1)


OUTPUT_POINTERS = (
    "forward_kl_ptr",
    "reverse_kl_ptr",
    "student_logprob_ptr",
    "teacher_logprob_ptr",
    "student_entropy_ptr",
    "teacher_entropy_ptr",
    "rank_ptr",
    "argmax_ptr",
    "score_ptr",
    "threshold_ptr",
    "stray_ptr",
)

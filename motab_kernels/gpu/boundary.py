"""`fused_kl_boundary` on Triton: one launch reads the logits, a second decides, with one program per row.

B rows, T tokens, V shared vocabulary, S splits of it. No atomics, and the host does not wait. The formulas
are in `boundary_partial`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from motab_kernels.boundary_state import Rule
from motab_kernels.gpu import launched_on
from motab_kernels.gpu.boundary_decide import decide_kernel
from motab_kernels.gpu.boundary_partial import partial_kernel, rows
from motab_kernels.gpu.tuned import tuned


class Settings(NamedTuple):
    """How the vocabulary is divided. A tile is `lanes` x `per_lane` columns and a split `tiles` tiles."""

    lanes: int = 128  # one a thread
    per_lane: int = 16  # of a lane, which share one rescaling; 128 bits of them are contiguous
    tiles: int = 4
    num_warps: int = 4
    sums: int = 128  # (position, split) pairs that the deciding warp combines at a time; 256 spill


DEFAULT = Settings()
HIP = Settings(lanes=256, tiles=2)  # a wave has 64 threads


def settings_for(device: torch.device) -> Settings:
    return tuned("boundary", device, DEFAULT, HIP)


def workspace_shape(positions: int, V: int, settings: Settings) -> tuple[int, int, int]:
    """(positions, sums, splits) float32. The splits depend on V only, so that a row's sums are independent of its
    batch."""
    return positions, rows(), triton.cdiv(V, settings.lanes * settings.per_lane * settings.tiles)


def positions_at_a_time(S_BLOCK: int, settings: Settings) -> int:
    """How many the deciding warp takes, at most one a thread. By V alone, not T: the layout of a sum, and so its last
    bit, must not depend on how a text is cut."""
    return max(1, min(32, settings.sums // S_BLOCK))


def fused_kl_boundary(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    step_ends: Tensor | None,
    temperature: Tensor | None,
    doubt: Tensor | None,
    rule: Rule,
    state: tuple[Tensor, Tensor, Tensor],
    out: list[Tensor],
    workspace: Tensor,
    settings: Settings,
) -> None:
    """Write `out`, (B, T) contiguous each, from (B, T, V) logits contiguous in V; update `state`'s tensors.

    `doubt` (B, T) contiguous, if given, replaces the teacher's entropy in the threshold.
    """
    B, T, V = student_logits.shape
    S = workspace_shape(B * T, V, settings)[2]
    S_BLOCK = triton.next_power_of_2(S)
    vector = 16 // max(student_logits.element_size(), teacher_logits.element_size())  # 128 bits
    strides = {
        "student_stride_b": student_logits.stride(0),
        "student_stride_t": student_logits.stride(1),
        "teacher_stride_b": teacher_logits.stride(0),
        "teacher_stride_t": teacher_logits.stride(1),
        "token_stride_b": token_ids.stride(0),
        "token_stride_t": token_ids.stride(1),
        "temperature_stride_b": row_stride(temperature),
    }
    logits = {"student_ptr": student_logits, "teacher_ptr": teacher_logits, "token_ptr": token_ids}
    # An absent tensor's pointer is never read; any other stands in for it.
    absent = token_ids
    given = {"temperature_ptr": absent if temperature is None else temperature, "partial_ptr": workspace}
    with launched_on(student_logits.device):
        partial_kernel[(B * T, S)](
            **logits,
            **given,
            **strides,
            T=T,
            V=V,
            HAS_TEMPERATURE=temperature is not None,
            GROUPS=settings.per_lane // vector,
            LANES=settings.lanes,
            VECTOR=vector,
            TILES=settings.tiles,
            num_warps=settings.num_warps,
        )
        decide_kernel[(B,)](
            **logits,
            **given,
            **strides,
            ends_ptr=absent if step_ends is None else step_ends,
            scale_ptr=rule.scale,
            theta_ptr=absent if rule.theta is None else rule.theta,
            doubt_ptr=absent if doubt is None else doubt,
            counters_ptr=state[0],
            scores_ptr=state[1],
            history_ptr=state[2],
            **dict(zip(OUTPUT_POINTERS, out, strict=True)),
            ends_stride_b=0 if step_ends is None else step_ends.stride(0),
            ends_stride_t=0 if step_ends is None else step_ends.stride(1),
            scale_stride_b=row_stride(rule.scale),
            theta_stride_b=row_stride(rule.theta),
            T=T,
            V=V,
            S=S,
            SCORE=rule.score,
            HAS_TEMPERATURE=temperature is not None,
            HAS_ENDS=step_ends is not None,
            HAS_THETA=rule.theta is not None,
            HAS_DOUBT=doubt is not None,
            WINDOW=rule.window,
            WINDOW_BLOCK=triton.next_power_of_2(max(1, rule.window)),
            SPLIT=settings.lanes * settings.per_lane * settings.tiles,
            S_BLOCK=S_BLOCK,
            T_BLOCK=positions_at_a_time(S_BLOCK, settings),
            num_warps=1,
        )


def row_stride(parameter: Tensor | float | None) -> int:
    """The stride of a parameter by rows; 0 if all rows share it."""
    return parameter.stride(0) if isinstance(parameter, Tensor) and parameter.dim() else 0


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

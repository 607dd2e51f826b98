"""`divergence_loss` on Triton. One launch reads the logits, one combines its sums; the kinds that need the normalisers
first read the logits once more; the backward pass reads them once and writes the gradient.

The functions are those of `DivergenceKernels`; a slice is a split of the vocabulary. No atomics, and the host does not
wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from motab_kernels.gpu import NVIDIA, launch, launched_on, row_stride
from motab_kernels.gpu.divergence_sums import finish_kernel, sums_kernel
from motab_kernels.gpu.divergence_terms import gradient_kernel, terms_kernel
from motab_kernels.gpu.tuned import tuned


class Settings(NamedTuple):
    """How the vocabulary is divided. A tile is `lanes` x `per_lane` columns and a split `tiles` tiles.

    A tile has at least 128 bits of columns for each thread. Otherwise two threads would hold the same columns, and
    where a gradient is written over the logits, one would read what the other has written.
    """

    lanes: int = 128  # one a thread
    per_lane: int = 16
    tiles: int = 16
    num_warps: int = 4
    rows: int = 16  # of positions that one program of `finish` combines


DEFAULT = Settings()
HIP = Settings(lanes=256, tiles=8)  # a wave has 64 threads


def settings_for(device: torch.device) -> Settings:
    return tuned("divergence", device, DEFAULT, HIP)


def splits(V: int, settings: Settings) -> int:
    """The number of splits. It depends on V only, so that a row's sums do not depend on its batch."""
    return -(-V // (settings.lanes * settings.per_lane * settings.tiles))


def _arguments(student: Tensor, teacher: Tensor, tau: Tensor | None, settings: Settings) -> dict[str, Any]:
    """Arguments that the kernels over the vocabulary share. An absent tensor's pointer is never read."""
    vector = 16 // max(student.element_size(), teacher.element_size())  # 128 bits
    return {
        "student_ptr": student,
        "teacher_ptr": teacher,
        "temperature_ptr": student if tau is None else tau,
        "student_stride_b": student.stride(0),
        "student_stride_t": student.stride(1),
        "teacher_stride_b": teacher.stride(0),
        "teacher_stride_t": teacher.stride(1),
        "temperature_stride_b": row_stride(tau),
        "T": student.shape[1],
        "V": student.shape[2],
        "HAS_TEMPERATURE": tau is not None,
        "FAST": NVIDIA,
        "GROUPS": settings.per_lane // vector,
        "LANES": settings.lanes,
        "VECTOR": vector,
        "TILES": settings.tiles,
    }


def _contiguous_vocabulary(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def divergence_sums(student: Tensor, teacher: Tensor, tau: Tensor | None, keep: Tensor | None, kind: str) -> Tensor:
    student, teacher = _contiguous_vocabulary(student), _contiguous_vocabulary(teacher)
    settings = settings_for(student.device)
    B, T, V = student.shape
    sums = torch.empty((B * T, 6, splits(V, settings)), dtype=torch.float32, device=student.device)
    arguments = {
        **_arguments(student, teacher, tau, settings),
        "keep_ptr": student if keep is None else keep,
        "sums_ptr": sums,
        "HAS_KEEP": keep is not None,
        "FORWARD": kind == "forward_kl",
        "REVERSE": kind == "reverse_kl",
    }
    with launched_on(student.device):
        launch(sums_kernel, (B * T, sums.shape[2]), arguments, num_warps=settings.num_warps)
    return sums


def finish(sums: Tensor, tau: Tensor | None, keep: Tensor | None, kind: str, T: int) -> tuple[Tensor, Tensor]:
    R, _, S = sums.shape
    loss = torch.empty(R, dtype=torch.float32, device=sums.device)
    saved = torch.empty((R, 6), dtype=torch.float32, device=sums.device)
    rows = settings_for(sums.device).rows
    arguments = {
        "sums_ptr": sums,
        "keep_ptr": sums if keep is None else keep,
        "temperature_ptr": sums if tau is None else tau,
        "loss_ptr": loss,
        "saved_ptr": saved,
        "temperature_stride_b": row_stride(tau),
        "T": T,
        "R": R,
        "S": S,
        "HAS_KEEP": keep is not None,
        "HAS_TEMPERATURE": tau is not None,
        "FORWARD": kind == "forward_kl",
        "ROWS": rows,
        "S_BLOCK": triton.next_power_of_2(S),
    }
    with launched_on(sums.device):
        launch(finish_kernel, (-(-R // rows),), arguments)
    return loss, saved


def divergence_terms(
    student: Tensor, teacher: Tensor, tau: Tensor | None, keep: Tensor | None, saved: Tensor, kind: str, lam: float
) -> Tensor:
    student, teacher = _contiguous_vocabulary(student), _contiguous_vocabulary(teacher)
    settings = settings_for(student.device)
    B, T, V = student.shape
    terms = torch.empty((B * T, 2, splits(V, settings)), dtype=torch.float32, device=student.device)
    arguments = {
        **_arguments(student, teacher, tau, settings),
        "keep_ptr": student if keep is None else keep,
        "saved_ptr": saved,
        "terms_ptr": terms,
        "lam": lam,
        "rest": 1 - lam,
        "KIND": kind,
        "EVEN": lam == 0.5,
        "HAS_KEEP": keep is not None,
    }
    with launched_on(student.device):
        launch(terms_kernel, (B * T, terms.shape[2]), arguments, num_warps=settings.num_warps)
    return terms


def divergence_gradient(
    student: Tensor,
    teacher: Tensor,
    tau: Tensor | None,
    saved: Tensor,
    scale: Tensor,
    kind: str,
    lam: float,
    out: Tensor,
    softcap: float = 0.0,
) -> None:
    student, teacher = _contiguous_vocabulary(student), _contiguous_vocabulary(teacher)
    settings = settings_for(student.device)
    B, T, V = student.shape
    arguments = {
        **_arguments(student, teacher, tau, settings),
        "saved_ptr": saved,
        "scale_ptr": scale,
        "out_ptr": out,
        "out_stride_b": out.stride(0),
        "out_stride_t": out.stride(1),
        "lam": lam,
        "rest": 1 - lam,
        "KIND": kind,
        "EVEN": lam == 0.5,
        "HAS_SOFTCAP": softcap > 0,
        "per_cap": 1 / softcap if softcap else 0.0,
    }
    with launched_on(student.device):
        launch(gradient_kernel, (B * T, splits(V, settings)), arguments, num_warps=settings.num_warps)

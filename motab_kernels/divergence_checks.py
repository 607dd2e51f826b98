"""Checks of the arguments of the losses, before anything is computed, and what their settings mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from motab_kernels.arguments import (
    DIVISORS,
    check_logits,
    check_number,
    check_parameter,
    check_place,
    check_whole,
    shared_columns,
)
from motab_kernels.divergence_sums import DIVERGENCES
from motab_kernels.tensors import DTYPES
from motab_kernels.vocab_parallel import gather

REDUCTIONS = ("none", "sum", "mean", "batchmean")


def resolve(divergence: str, beta: float, alpha: float) -> tuple[str, float]:
    """The kind that runs, and lam, the teacher's share in its mixture. At its limits a mixture's kind is a KL."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    check_number("beta", beta)
    check_number("alpha", alpha)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected 0 to 1, got {beta}")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha: expected at least 0 and below 1, got {alpha}")
    if divergence == "jsd" and beta in (0, 1):
        return ("reverse_kl" if beta else "forward_kl"), 0.0
    if divergence.startswith("skew") and alpha == 0:
        return divergence.removeprefix("skew_"), 0.0
    return divergence, float({"jsd": beta, "skew_forward_kl": alpha, "skew_reverse_kl": 1 - alpha}.get(divergence, 0))


def check_tensors(
    student: Tensor, teacher: Tensor, mask: Tensor | None, weights: Tensor | None, vocab_size: int | None
) -> int:
    """The number of columns that count."""
    check_logits(student, teacher)
    leading, device = student.shape[:-1], student.device
    if teacher.shape[:-1] != leading or teacher.device != device:
        expected = f"the student's leading shape, {(*leading, 'V')}, on {device}"
        raise ValueError(f"teacher_logits: expected {expected}, got {tuple(teacher.shape)} on {teacher.device}")
    check_no_gradient("teacher_logits", teacher)
    check_position_tensors(mask, weights, leading, device)
    return shared_columns(student.shape[-1], teacher.shape[-1], vocab_size)


def check_no_gradient(name: str, x: Tensor | None) -> None:
    if x is not None and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without gradient, because none flows to it, got requires_grad=True: "
            "detach it, or run what makes it under torch.no_grad()"
        )


def check_position_tensors(
    mask: Tensor | None, weights: Tensor | None, leading: torch.Size, device: torch.device
) -> None:
    for name, x, kind in (("mask", mask, "bool"), ("weights", weights, "floating-point")):
        if x is None:
            continue
        check_whole(name, x)
        fits = x.dtype == torch.bool if name == "mask" else x.dtype.is_floating_point
        if x.shape != leading or not fits or x.device != device:
            expected = f"{kind} of shape {tuple(leading)} on {device}"
            raise ValueError(f"{name}: expected {expected}, got {x.dtype} of shape {tuple(x.shape)} on {x.device}")
        check_no_gradient(name, x)


def temperature_tensor(temperature: float | Tensor, B: int, device: torch.device) -> Tensor | None:
    """The temperature as a float32 (or float64) tensor, None for 1."""
    check_parameter("temperature", temperature, *DIVISORS)
    if not isinstance(temperature, Tensor):
        return None if temperature == 1.0 else torch.full((), temperature, dtype=torch.float64, device=device)
    check_place("temperature", temperature, B, device)
    check_no_gradient("temperature", temperature)
    return temperature.detach()


def divisor(reduction: str, num_items: int | Tensor | None, mask: Tensor | None, student: Tensor) -> int | Tensor:
    """The divisor of the sum of the losses; at least 1, so that the loss is 0 where nothing counts."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items is not None:
        if reduction in ("none", "sum"):
            raise ValueError(f'num_items: expected None with reduction "{reduction}", which does not divide')
        if isinstance(num_items, Tensor):
            if num_items.dim() or num_items.dtype == torch.bool or num_items.is_complex():
                got = f"{num_items.dtype} of shape {tuple(num_items.shape)}"
                raise ValueError(f"num_items: expected a number or a 0-d tensor of one, got {got}")
            check_no_gradient("num_items", num_items)
            if num_items.device.type == "cpu" and not torch.compiler.is_compiling() and not num_items >= 0:
                raise ValueError(f"num_items: expected a number >= 0, got {num_items}")
            num_items = num_items.to(student.device)
            return torch.where(num_items > 0, num_items, 1)  # of micro-batches without a position
        check_parameter("num_items", num_items, *DIVISORS)
        return num_items
    if reduction == "batchmean":
        return max(1, student.shape[0])
    if reduction == "mean":
        return max(1, student.shape[:-1].numel()) if mask is None else mask.sum().clamp_min(1)
    return 1


def check_whole_heads(*heads: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Hidden states, weight and bias, if there is one, of the student and of the teacher."""
    for side, (hidden, weight, bias) in zip(("student", "teacher"), heads, strict=True):
        check_whole(f"{side}_hidden", hidden)
        check_whole(f"{side}_weight", weight)
        if bias is not None:
            check_whole(f"{side}_bias", bias)


def check_heads(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    scales: tuple[float, float],
    softcaps: tuple[float | None, float | None],
    mask: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Check hidden states, weight and bias of both sides, and the tensors over the positions."""
    sides = zip(("student", "teacher"), (student, teacher), scales, softcaps, strict=True)
    for side, (hidden, weight, bias), scale, softcap in sides:
        if hidden.dtype not in DTYPES:
            raise ValueError(f"{side}_hidden: expected float32, bfloat16, float16 or float64, got {hidden.dtype}")
        if hidden.dim() not in (2, 3):
            raise ValueError(f"{side}_hidden: expected shape (B, H) or (B, T, H), got {tuple(hidden.shape)}")
        expected = f"{hidden.dtype} of shape (V, {hidden.shape[-1]}) on {hidden.device}, as its hidden states"
        got = f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        if weight.shape == (0,):  # what a process has of it between forward passes
            got += ", as of a weight that ZeRO-3 or FSDP has partitioned: gather it"
        if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(f"{side}_weight: expected {expected}, got {got}")
        if weight.dtype != hidden.dtype or weight.device != hidden.device:
            raise ValueError(f"{side}_weight: expected {expected}, got {got}")
        if bias is not None and (
            bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or bias.device != weight.device
        ):
            expected = f"{weight.dtype} of shape ({weight.shape[0]},) on {weight.device}"
            got = f"{bias.dtype} of shape {tuple(bias.shape)} on {bias.device}"
            raise ValueError(f"{side}_bias: expected {expected}, got {got}")
        check_number(f"{side}_logit_scale", scale)
        if softcap is not None:
            check_parameter(f"{side}_softcap", softcap, *DIVISORS)
            check_number(f"{side}_softcap", softcap)
    leading, device = student[0].shape[:-1], student[0].device
    if teacher[0].shape[:-1] != leading or teacher[0].device != device:
        expected = f"the student's leading shape, {(*leading, 'H')}, on {device}"
        raise ValueError(f"teacher_hidden: expected {expected}, got {tuple(teacher[0].shape)} on {teacher[0].device}")
    # The teacher's weight is not checked: the parameters of a head that is not frozen require gradients.
    check_no_gradient("teacher_hidden", teacher[0])
    check_position_tensors(mask, weights, leading, device)


def check_finite_gradient(gradient: Tensor, group: str, first_position: int = 0) -> None:
    finite = gradient.flatten(0, -2).isfinite().all(-1)
    if group:  # every rank raises, or none: a rank that went on would wait for the others
        finite = gather(finite.byte(), group).bool().all(-1)
    if not finite.all():
        first = first_position + int((~finite).nonzero()[0])
        count = int((~finite).sum())
        raise ValueError(
            f"gradient: expected finite values, got {count} of {len(finite)} positions with NaN or inf, the first "
            f"{first} (counted over the flattened leading shape): look at its logits, or mask it"
        )


def refuse_second_derivative(name: str) -> None:
    """Raise in a backward pass that is itself differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise ValueError(
            f"{name}: expected a backward pass for first derivatives, got create_graph=True; for second derivatives "
            "write the divergence in PyTorch"
        )


def refuse_transforms(name: str, *inputs: Tensor | None) -> None:
    """Raise for a tensor of a transform that a registered op has none of: a dual tensor, whose tangent would be lost
    silently, or one that torch.func tracks."""
    if torch.compiler.is_compiling():
        return
    for x in inputs:
        if x is None:
            continue
        kind = "forward-mode derivatives, got a dual tensor (torch.func.jvp)"
        if forward_ad.unpack_dual(x).tangent is None:
            if not torch._C._functorch.is_gradtrackingtensor(x):
                continue
            kind = "transform, got a tensor that torch.func.grad, vjp or jacrev tracks"
        raise ValueError(
            f"{name}: expected no {kind}: take the gradient by backward(), or write the divergence in PyTorch"
        )

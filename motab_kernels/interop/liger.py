"""Liger Kernel's distillation losses on ours. BT positions, V vocabulary, H hidden size.

Each class has its original's arguments and attributes, and `patch()` gives Liger's own classes our forward passes, so
that instances made before are switched too. What differs: `docs/switch.md`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from motab_kernels.divergence import divergence_loss
from motab_kernels.interop import patching
from motab_kernels.interop.tensors import head_inputs, valid, wide
from motab_kernels.linear_divergence import fused_linear_divergence

__all__ = [
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerJSD",
    "LigerKLDIVLoss",
    "LigerTVDLoss",
    "patch",
    "patched",
]


class LigerJSD(torch.nn.Module):
    """`divergence_loss(..., divergence="jsd")` of log-probabilities, which are logits that need no normalising.

    The gradient by `log_q` is the projected one, that of `divergence_loss(log_q, ...)` by its logits, which sums to 0:
    through the caller's `log_softmax` it becomes the same gradient by the logits as Liger's.
    If you have the logits, pass them to `divergence_loss` instead, and make no log-probabilities.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """log_q (BT, V) of the student, log_p (BT, V) of the teacher, shift_labels (BT,): the mean over valid ones."""
        mask = valid(shift_labels, self.ignore_index)
        return divergence_loss(log_q, log_p.detach(), divergence="jsd", beta=self.beta, mask=mask)


class LigerKLDIVLoss(torch.nn.KLDivLoss):
    """`divergence_loss(..., divergence="forward_kl")` of log-probabilities, with the gradient of `LigerJSD`.

    `eps` is accepted without effect: a probability of 0 adds nothing here, and one smaller than `eps` is exact.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """y_pred (BT, V) log-probabilities of the student; y_true (BT, V) probabilities of the teacher, or
        log-probabilities with `log_target`. As in Liger "mean" divides by BT * V, "batchmean" by BT."""
        divisors = {"sum": 1, "mean": y_pred.numel(), "batchmean": len(y_pred)}
        if self.reduction not in divisors:
            raise ValueError(
                f"reduction: expected one of {', '.join(divisors)}, got {self.reduction!r}: no tensor of single terms "
                'is made; for a loss per position, divergence_loss(..., reduction="none")'
            )
        log_p = y_true if self.log_target else wide(y_true).log()
        return divergence_loss(y_pred, log_p.detach(), reduction="sum") / max(1, divisors[self.reduction])


class LigerTVDLoss(torch.nn.Module):
    """1/2 sum |p - q| of probabilities, with a slope of 0 where p = q.

    The one class here that runs in plain PyTorch: from probabilities there is nothing to fuse. From logits,
    `divergence_loss(..., divergence="tvd")` needs neither side's probabilities.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """p (BT, V), with gradient, q (BT, V), without, shift_labels (BT,). "none" gives (BT, V), "mean" divides by
        the valid positions times V, "batchmean" by the valid positions."""
        if self.reduction not in ("none", "sum", "mean", "batchmean"):
            raise ValueError(f"reduction: expected one of none, sum, mean, batchmean, got {self.reduction!r}")
        difference = wide(p) - wide(q).detach()
        mask = valid(shift_labels, self.ignore_index)
        count: int | Tensor = len(p)
        if mask is not None:
            difference, count = difference.masked_fill(~mask[:, None], 0), mask.sum().clamp_min(1)
        terms = difference.abs() / 2
        if self.reduction == "none":
            return terms
        return terms.sum() / {"sum": 1, "mean": count * p.shape[1], "batchmean": count}[self.reduction]


class LigerFusedLinearJSD(torch.nn.Module):
    """`fused_linear_divergence(..., divergence="jsd")`.

    `accum_dtype` is accepted without effect: for the dtype of the sums see `fused_linear_divergence`.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """(BT, H) and (V, H) of both sides, shift_labels (BT,): the mean over valid positions."""
        return fused_linear_divergence(
            *head_inputs(student_input, student_weight)[:2],
            *head_inputs(teacher_input.detach(), teacher_weight.detach())[:2],
            divergence="jsd",
            beta=self.jsd_beta,
            temperature=self.temperature,
            mask=valid(shift_labels, self.ignore_index),
        )


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """`weight_hard_loss` * cross-entropy with the labels + `weight_soft_loss` * JSD with the teacher, of
    `liger_kernel.chunked_loss`.

    The hard loss costs matrix products of its own, three of the student's head, and is left out at a weight of 0.
    `compiled` is accepted without effect.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """(BT, H) and (V, H) of both sides, true_labels (BT,), biases (V,): the weighted loss, or with
        `return_soft_hard_loss` it, the soft and the hard loss, the last two without gradient."""
        hidden, weight, bias = head_inputs(student_input, student_weight, student_bias)
        teacher = head_inputs(teacher_input.detach(), teacher_weight.detach(), teacher_bias)
        soft = fused_linear_divergence(
            hidden,
            weight,
            *teacher[:2],
            student_bias=bias,
            teacher_bias=teacher[2],
            divergence="jsd",
            beta=self.beta,
            temperature=self.temperature,
            mask=true_labels != self.ignore_index,
            chunk_size=self.chunk_size,
        )
        if self.weight_hard_loss == 0 and not self.return_soft_hard_loss:
            return self.weight_soft_loss * soft

        def chunk_loss(hidden: Tensor, labels: Tensor) -> Tensor:
            logits = wide(F.linear(hidden, weight, bias))
            return F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")

        # The logits are computed again in the backward pass, so that they exist for one chunk at a time.
        chunks = zip(hidden.split(self.chunk_size), true_labels.split(self.chunk_size), strict=True)
        sums = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        hard = torch.stack(sums).sum() / (true_labels != self.ignore_index).sum().clamp_min(1)
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


PEER = "liger-kernel 0.8"
TARGETS = [
    patching.Target("liger_kernel.transformers.jsd", "LigerJSD.forward", LigerJSD.forward),
    patching.Target("liger_kernel.transformers.kl_div", "LigerKLDIVLoss.forward", LigerKLDIVLoss.forward),
    patching.Target("liger_kernel.transformers.tvd", "LigerTVDLoss.forward", LigerTVDLoss.forward),
    patching.Target(
        "liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD.forward", LigerFusedLinearJSD.forward
    ),
    patching.Target(
        "liger_kernel.chunked_loss.jsd_loss", "LigerFusedLinearJSDLoss.forward", LigerFusedLinearJSDLoss.forward
    ),
]


def patch() -> patching.Undo:
    """Give Liger's five classes our forward passes; call the returned function to undo it."""
    return patching.patch(PEER, TARGETS)


patched = patching.as_context(patch)

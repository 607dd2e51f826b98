"""verl's top-k distillation loss on ours, under a loss mode of its own.

verl's teacher sends the log-probabilities of its k most likely tokens, and the loss is the part of the forward KL that
they show: sum over those k of p (log p - log q). The part can be below 0; verl's own mode then cuts it, with its
gradient, to 0. This one does not, and keeps float32 throughout. Read from verl's sources, never run with verl.

B rows (1 where they are packed), T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from motab_kernels.divergence import divergence_loss
from motab_kernels.interop import patching

__all__ = ["LOSS_MODE", "compute_topk_loss", "forward_kl_topk", "padded_loss", "patch", "patched"]

#: What to set `distillation_loss.loss_mode` to after `patch()`.
LOSS_MODE = "motab_forward_kl_topk"


def forward_kl_topk(student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor) -> Tensor:
    """Each position's sum over k of p (log p - log q), differentiable by the student's logits.

    With P the sum of the k probabilities it is P (KL(p / P || q) + log P), the KL being `divergence_loss`'s. Needs one
    float32 tensor of the size of the logits beside their gradient.

    Args:
        student_logits: (B, T, V).
        teacher_topk_log_probs: (B, T, k); not renormalised. A position where all are -inf gives 0.
        teacher_topk_ids: (B, T, k), int64, no two alike at a position.
    """
    log_probs = teacher_topk_log_probs.detach().float()
    log_mass = log_probs.logsumexp(-1)
    known = log_mass > -torch.inf
    teacher = torch.full(student_logits.shape, -torch.inf, dtype=torch.float32, device=student_logits.device)
    teacher.scatter_(-1, teacher_topk_ids, log_probs)
    mass = log_mass.exp()
    kl = divergence_loss(student_logits, teacher, weights=mass, reduction="none")
    return kl + torch.where(known, mass * log_mass, 0.0)


def compute_topk_loss(
    config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """verl's function of this name, for `LOSS_MODE`: it runs where the student's logits are.

    Raises:
        ValueError: a strategy that splits the vocabulary, `log_prob_min_clamp`, or teacher and student of different
            length, as sequence parallelism makes them.
    """
    if config.strategy == "megatron":
        raise ValueError('strategy: expected logits of the whole vocabulary, got "megatron": use "fsdp"')
    clamp = distillation_config.distillation_loss.log_prob_min_clamp
    if clamp is not None:
        raise ValueError(f"log_prob_min_clamp: expected None, because nothing here overflows, got {clamp}")
    log_probs, ids = (
        x.values().unsqueeze(0) if x.is_nested else x for x in (data["teacher_logprobs"], data["teacher_ids"])
    )
    if log_probs.shape[:2] != student_logits.shape[:2]:
        raise ValueError(
            f"teacher_logprobs: expected {tuple(student_logits.shape[:2])} positions, as the student's logits, got "
            f"{tuple(log_probs.shape[:2])}: sequence parallelism is not supported"
        )
    losses = forward_kl_topk(student_logits, log_probs, ids)
    return {"distillation_losses": losses, "teacher_mass": log_probs.detach().float().exp().sum(-1)}


def padded_loss(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The registered loss: what `compute_topk_loss` gave, as (B, response length), and the teacher's mean mass."""
    padding = importlib.import_module("verl.workers.utils.padding")
    losses, mass = (
        padding.no_padding_2_padding(model_output[x], data) for x in ("distillation_losses", "teacher_mass")
    )
    mask = data["response_mask"]
    mask = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
    return losses, {"distillation/teacher_mass": mass[mask].mean().item()}


PEER = "verl's trainer/distillation/losses.py of 2026"


def patch() -> patching.Undo:
    """Register `LOSS_MODE` with verl; call the returned function to undo it. Every worker process must call this."""

    def dispatch(
        config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
    ) -> dict[str, Tensor]:
        is_ours = distillation_config.distillation_loss.loss_mode == LOSS_MODE
        function = compute_topk_loss if is_ours else original
        return function(config, distillation_config, data, student_logits, data_format)

    target = patching.Target("verl.trainer.distillation.losses", "compute_topk_loss", dispatch)
    losses, _, original = patching.find(PEER, target)
    if LOSS_MODE in losses.DISTILLATION_LOSS_REGISTRY:
        raise ValueError(f"{LOSS_MODE}: expected one patch at a time, got a second: undo the first")
    losses.register_distillation_loss(losses.DistillationLossSettings(names=[LOSS_MODE], use_topk=True))(padded_loss)
    put_back = patching.patch(PEER, [target])

    def undo() -> None:
        put_back()
        losses.DISTILLATION_LOSS_REGISTRY.pop(LOSS_MODE, None)
        losses.DISTILLATION_SETTINGS_REGISTRY.pop(LOSS_MODE, None)

    return undo


patched = patching.as_context(patch)

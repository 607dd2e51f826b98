"""TRL's distillation losses on ours: those of its DistillationTrainer and of its experimental GKDTrainer.

B rows, T tokens, V vocabulary, N valid positions. What differs: `docs/switch.md`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from motab_kernels.boundary import fused_kl_boundary
from motab_kernels.divergence import divergence_loss
from motab_kernels.interop import patching
from motab_kernels.interop.tensors import head_inputs, valid
from motab_kernels.linear_divergence import fused_linear_divergence
from motab_kernels.linear_head import BUDGET, Head
from motab_kernels.tensors import wide_dtype

__all__ = ["chunked_divergence_loss", "generalized_jsd_loss", "patch", "patched"]


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss`: `divergence_loss(..., divergence="jsd")` of the positions whose label is not
    -100.

    As there, `num_items_in_batch` divides the sum whatever the reduction; "batchmean" divides by the valid positions,
    but by B where there are no labels; "mean" divides by the valid positions times V.

    Raises:
        ValueError: reduction "none", because no tensor of single terms is made; and as `divergence_loss`.
    """
    mask = valid(labels, -100)
    total = divergence_loss(
        student_logits,
        teacher_logits,
        divergence="jsd",
        beta=beta,
        temperature=temperature,
        mask=mask,
        reduction="sum",
    )
    if num_items_in_batch is not None:
        return total / (
            num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        )
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / (max(1, len(student_logits)) if mask is None else mask.sum().clamp_min(1))
    if reduction == "mean":
        positions = student_logits.shape[:-1].numel() if mask is None else mask.sum().clamp_min(1)
        return total / (positions * student_logits.shape[-1])
    raise ValueError(
        f"reduction: expected one of batchmean, sum, mean, got {reduction!r}: no tensor of single terms is made; for a "
        'loss per position, divergence_loss(..., divergence="jsd", reduction="none")'
    )


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    *,
    entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_chunked_divergence_loss` of TRL's DistillationTrainer: `fused_linear_divergence(..., divergence="jsd")` of the
    positions in the mask, the sum of the student's entropies there, and their number.

    The entropy needs the student's logits once more: one matrix product above the four of the loss and its gradients.
    Without `entropy` it is NaN, which the trainer leaves out of its logs.

    Args:
        student_hidden_states, teacher_hidden_states: (B, T, H), each with its own H.
        student_lm_head_weight, teacher_lm_head_weight: (V, H). An FSDP2 shard is gathered, and gets the mean of the
            processes' gradients; each is cast to the hidden states' dtype, or autocast's.
        completion_mask: (B, T), 0 where a position does not count.
        num_items_in_batch: what the sum is divided by; None: the number of positions in the mask.
    """
    keep = completion_mask.reshape(-1) != 0
    count = keep.sum()

    def inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        # Only the positions that count are multiplied with a head, as in TRL; the host waits for their number.
        return head_inputs(hidden.reshape(-1, hidden.shape[-1])[keep], _whole(weight), _whole(bias))

    student = inputs(student_hidden_states, student_lm_head_weight, student_lm_head_bias)
    with torch.no_grad():
        teacher = inputs(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    total = fused_linear_divergence(
        *student[:2],
        *teacher[:2],
        student_bias=student[2],
        teacher_bias=teacher[2],
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_final_logit_softcapping,
        teacher_softcap=teacher_final_logit_softcapping,
        divergence="jsd",
        beta=beta,
        temperature=temperature,
        reduction="sum",
    )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    loss = total / (count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch)
    if entropy:
        entropies = entropy_sum(*student, student_logit_scale, student_final_logit_softcapping, temperature)
    else:
        entropies = total.new_full((), torch.nan)
    return loss, entropies, count


@torch.no_grad()
def entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> Tensor:
    """The sum of the entropies in nats, some positions' logits at a time."""
    total = torch.zeros((), dtype=wide_dtype(hidden), device=hidden.device)
    head = Head(hidden, weight, bias, scale, softcap or 0.0)
    size = max(1, BUDGET // (len(weight) * total.element_size()))
    for start in range(0, len(hidden), size):
        logits = head.logits(slice(start, start + size))
        unused = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        total += fused_kl_boundary(logits, logits, unused, temperature=temperature).student_entropy.sum()
    return total


def _whole(x: Any) -> Any:
    """A parameter that FSDP2 shards (DTensor) as a whole one; its gradient is the mean over the processes."""
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    mesh = x.device_mesh
    whole = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


PEER = "trl 1.16"


def patch(*, entropy: bool = True) -> patching.Undo:
    """Let DistillationTrainer and GKDTrainer call ours; call the returned function to undo it.

    Without `entropy` the student's entropy is neither computed nor logged: see `chunked_divergence_loss`.
    """
    chunked = functools.partial(chunked_divergence_loss, entropy=entropy)
    targets = [
        patching.Target("trl.trainer.distillation_trainer", "_chunked_divergence_loss", chunked),
        patching.Target(
            "trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss", staticmethod(generalized_jsd_loss)
        ),
    ]
    return patching.patch(PEER, targets)


patched = patching.as_context(patch)

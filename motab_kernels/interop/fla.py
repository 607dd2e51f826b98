"""flash-linear-attention's fused KL loss on ours. What differs: `docs/switch.md`."""

from __future__ import annotations

import torch
from torch import Tensor

from motab_kernels.interop import patching
from motab_kernels.interop.tensors import head_inputs
from motab_kernels.linear_divergence import fused_linear_divergence

__all__ = ["FusedKLDivLoss", "fused_kl_div_loss", "patch", "patched"]


def fused_kl_div_loss(
    x: Tensor,
    target_x: Tensor,
    weight: Tensor,
    target_weight: Tensor,
    reduction: str = "batchmean",
    accumulate_grad_in_fp32: bool = True,
) -> Tensor:
    """`fused_linear_divergence(x, weight, target_x, target_weight, divergence="forward_kl")`: the teacher's hidden
    states come second here.

    Args:
        x, target_x: (N, H) of the student and of the teacher, each with its own H.
        weight, target_weight: (V, H).
        reduction: "batchmean", the mean over N; "sum".
        accumulate_grad_in_fp32: accepted and without effect: see `fused_linear_divergence`.

    Raises:
        ValueError: a teacher that asks for a gradient, where fla raises RuntimeError; another reduction.
    """
    if reduction not in ("batchmean", "sum"):
        raise ValueError(f"reduction: expected batchmean or sum, got {reduction!r}")
    if target_weight.requires_grad:
        raise ValueError(
            "target_weight: expected a tensor without gradient, because none flows to the teacher, got "
            "requires_grad=True: detach it"
        )
    return fused_linear_divergence(
        *head_inputs(x, weight)[:2],
        *head_inputs(target_x, target_weight)[:2],
        reduction="mean" if reduction == "batchmean" else "sum",
    )


class FusedKLDivLoss(torch.nn.Module):
    def __init__(self, reduction: str = "batchmean", accumulate_grad_in_fp32: bool = True) -> None:
        super().__init__()
        if reduction != "batchmean":
            raise ValueError(f"reduction: expected batchmean, got {reduction!r}")
        self.reduction = reduction
        self.accumulate_grad_in_fp32 = accumulate_grad_in_fp32

    def forward(self, x: Tensor, target_x: Tensor, weight: Tensor, target_weight: Tensor) -> Tensor:
        """See `fused_kl_div_loss`."""
        return fused_kl_div_loss(x, target_x, weight, target_weight, self.reduction, self.accumulate_grad_in_fp32)


PEER = "flash-linear-attention 0.6"
TARGETS = [
    # fla's own class calls the first; other code imports the second.
    patching.Target("fla.modules.fused_kl_div.ops", "fused_kl_div_loss", fused_kl_div_loss),
    patching.Target("fla.modules.fused_kl_div", "fused_kl_div_loss", fused_kl_div_loss),
]


def patch() -> patching.Undo:
    """Let fla's `FusedKLDivLoss`, and code that imports `fused_kl_div_loss` from now on, call ours; call the returned
    function to undo it."""
    return patching.patch(PEER, TARGETS)


patched = patching.as_context(patch)

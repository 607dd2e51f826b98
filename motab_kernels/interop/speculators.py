"""The fused losses of vllm-project/speculators (and of SpecForge, which took them over) on ours.

All take logits (B, T, V) of the draft and targets (B, T, V), the logits of the model that it drafts for, and give each
position's loss, (B, T), float32. The targets get no gradient. What differs: `docs/switch.md`.
"""

from __future__ import annotations

from torch import Tensor

from motab_kernels.divergence import divergence_loss
from motab_kernels.interop import patching

__all__ = [
    "fused_js_div_loss",
    "fused_kl_div_loss",
    "fused_reverse_kl_div_loss",
    "fused_tv_loss",
    "patch",
    "patched",
]


def fused_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(targets || logits)."""
    return divergence_loss(logits, targets.detach(), divergence="forward_kl", reduction="none")


def fused_reverse_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(logits || targets)."""
    return divergence_loss(logits, targets.detach(), divergence="reverse_kl", reduction="none")


def fused_js_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of both sides' KL to their mean."""
    return divergence_loss(logits, targets.detach(), divergence="jsd", reduction="none")


def fused_tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - sum min(p, q), which is 1/2 sum |p - q|."""
    return divergence_loss(logits, targets.detach(), divergence="tvd", reduction="none")


PEER = "speculators' losses/fused.py of 2026"
TARGETS = [
    patching.Target("speculators.losses.fused", function.__name__, function)
    for function in (fused_kl_div_loss, fused_reverse_kl_div_loss, fused_js_div_loss, fused_tv_loss)
]


def patch() -> patching.Undo:
    """Let speculators' loss functions, which look theirs up by name at each call, find ours; call the returned
    function to undo it."""
    return patching.patch(PEER, TARGETS)


patched = patching.as_context(patch)

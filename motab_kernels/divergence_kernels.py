"""What the losses ask of a backend, and the forward pass on it.

B rows, T tokens, V shared vocabulary, R = B * T positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from motab_kernels.divergence_sums import CENTRE
from motab_kernels.tensors import as_normal

ONE_READ = ("forward_kl", "reverse_kl")  # the others need the normalisers first, and read the logits again


class DivergenceKernels(Protocol):
    """A backend of the losses: the modules named `divergence`, or `SlicedVocabulary`.

    S slices of the vocabulary, each summed on its own. Logits are (B, T, V). `tau` is the temperature, 0-d or (B,);
    None: 1. `keep` (R,) bool says which positions count; None: all. `lam` is the teacher's share in the mixture, see
    `reference/divergence.py`.
    """

    def divergence_sums(
        self, student: Tensor, teacher: Tensor, tau: Tensor | None, keep: Tensor | None, kind: str, /
    ) -> Tensor:
        """(R, 6, S): the sums of each slice. Those of a position that does not count may have any value."""

    def finish(
        self, sums: Tensor, tau: Tensor | None, keep: Tensor | None, kind: str, T: int, /
    ) -> tuple[Tensor, Tensor]:
        """The losses (R,), of the two KL kinds only, and what the backward pass needs, (R, 6)."""

    def divergence_terms(
        self,
        student: Tensor,
        teacher: Tensor,
        tau: Tensor | None,
        keep: Tensor | None,
        saved: Tensor,
        kind: str,
        lam: float,
        /,
    ) -> Tensor:
        """(R, 2, S): the divergence and sum q g over each slice, of the other kinds; 0 where a position does not
        count."""

    def divergence_gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        tau: Tensor | None,
        saved: Tensor,
        scale: Tensor,
        kind: str,
        lam: float,
        out: Tensor,
        softcap: float = 0.0,
        /,
    ) -> None:
        """Write d(sum of scale * divergence) / d(student) to `out` (B, T, V), contiguous in V, which may be the
        student's own logits. A position whose scale (R,) is 0 gets 0, whatever its logits. With a softcap the logits
        are softcap * tanh(x / softcap), and the derivative is that by x."""


if TYPE_CHECKING:  # mypy compares their functions with those above
    from motab_kernels.cpu import divergence as cpu
    from motab_kernels.gpu import divergence as gpu
    from motab_kernels.reference import divergence as reference

    MODULES: tuple[DivergenceKernels, ...] = (reference, cpu, gpu)


def divergence_forward(
    kernels: DivergenceKernels,
    student: Tensor,
    teacher: Tensor,
    tau: Tensor | None,
    keep: Tensor | None,
    kind: str,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """The losses (R,) of (B, T, V) logits, and what is saved for the backward pass, (R, 6)."""
    sums = kernels.divergence_sums(student, teacher, tau, keep, kind)
    loss, saved = kernels.finish(sums, tau, keep, kind, student.shape[1])
    if kind not in ONE_READ:
        loss, centre = kernels.divergence_terms(student, teacher, tau, keep, saved, kind, lam).sum(-1).unbind(-1)
        loss = torch.where(loss < 0, 0.0, loss)  # rounding
        saved[:, CENTRE] = centre
    return loss, saved


def weighted(loss: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """loss * weights, and 0 where the weight is 0 or the mask False, whatever the loss or the weight there."""
    weights = as_normal(weights.detach()).to(loss.dtype)
    weights = weights if mask is None else weights.masked_fill(~mask, 0)
    # By the weight alone: a loss that rounds to 0 still has a gradient.
    return torch.where(weights == 0, 0.0, loss * weights)

"""A vocabulary that is split among the ranks of a process group: the losses' only use of `torch.distributed`.

R positions. Each rank sums over its own columns. The sums, which are small, are gathered on every rank and combined in
the order of the ranks, so that all ranks have the same result to the last bit.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from motab_kernels.backend import implementation
from motab_kernels.divergence_sums import merge_sums
from motab_kernels.tensors import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from motab_kernels.divergence_kernels import DivergenceKernels


class SlicedVocabulary:
    """`DivergenceKernels` of a rank that holds some columns of the vocabulary, perhaps none that counts; its slices are
    the ranks'."""

    def __init__(self, kernels: DivergenceKernels, group: str) -> None:
        self.kernels, self.group = kernels, group
        self.finish = kernels.finish

    def divergence_sums(
        self, student: Tensor, teacher: Tensor, tau: Tensor | None, keep: Tensor | None, kind: str
    ) -> Tensor:
        """(R, 6, ranks). Each rank's sums are merged before they are sent."""
        B, T, V = student.shape
        if V == 0:
            dtype = wide_dtype(student, teacher)
            sums = student.new_zeros((B * T, 6), dtype=dtype)
            sums[:, ::3] = torch.finfo(dtype).min  # the maxima, as of a slice without finite logits
        else:
            sums = merge_sums(self.kernels.divergence_sums(student, teacher, tau, keep, kind), tau, T)
        return gather(sums, self.group)

    def divergence_terms(self, student: Tensor, *arguments: Any) -> Tensor:
        """(R, 2, ranks)."""
        if student.shape[-1] == 0:
            saved = arguments[3]
            return gather(saved.new_zeros((len(saved), 2)), self.group)
        return gather(self.kernels.divergence_terms(student, *arguments).sum(-1), self.group)

    def divergence_gradient(self, student: Tensor, *arguments: Any) -> None:
        """Of this rank's columns. The saved sums are those of the whole vocabulary: no communication."""
        if student.shape[-1]:
            self.kernels.divergence_gradient(student, *arguments)


def kernels_of(backend: str, device: torch.device, group: str) -> DivergenceKernels:
    """A backend's kernels; with the name of a group, those of a rank that holds a slice of the vocabulary."""
    kernels: DivergenceKernels = implementation("divergence", backend, device)
    return SlicedVocabulary(kernels, group) if group else kernels


def columns_here(
    group: ProcessGroup, student: int, teacher: int, vocab_size: int | None, device: torch.device, chunk_size: int = 0
) -> int:
    """The number of this rank's columns that count."""
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(
            f"group: expected a torch.distributed.ProcessGroup that this rank belongs to, got {group!r}; of a "
            "DeviceMesh take mesh.get_group()"
        )
    if student != teacher:
        raise ValueError(
            f"group: expected the same slice of the vocabulary of student and teacher, got {student} and {teacher} "
            "columns: slice both alike; where their vocabularies differ in size, first pad both to one size, and give "
            "the shared count as vocab_size"
        )
    width = 0 if vocab_size is None else student  # without vocab_size, slices may differ in width
    _check_agreement(group, device, {"width": width, "vocab_size": vocab_size or 0, "chunk_size": chunk_size})
    return student if vocab_size is None else min(max(vocab_size - group.rank() * width, 0), width)


#: By group, so that a later group of the same name is checked again.
_agreed: weakref.WeakKeyDictionary[ProcessGroup, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


def _check_agreement(group: ProcessGroup, device: torch.device, settings: dict[str, int]) -> None:
    """Raise if ranks differ in a setting: they would wait for ever or return a wrong loss. The host waits for the
    answer, so equal settings are compared once, and never while a graph is traced. A later difference goes unnoticed
    if some ranks return to settings that were compared before."""
    if torch.compiler.is_compiling():
        return
    known, ours = _agreed.setdefault(group, set()), tuple(settings.values())
    if ours in known:
        return
    for name, theirs in zip(settings, gather(torch.tensor(ours, device=device), group).tolist(), strict=True):
        if len(set(theirs)) > 1:
            raise ValueError(f"group: expected the same {name} on every rank, got {theirs} by rank")
    known.add(ours)


def gather(x: Tensor, group: ProcessGroup | str) -> Tensor:
    """Every rank's x, (*x.shape, ranks)."""
    ranks = _named(group) if isinstance(group, str) else group
    parts = x.new_empty((ranks.size(), *x.shape))
    torch.distributed.all_gather(list(parts), x.contiguous(), group=ranks)
    return parts.movedim(0, -1).contiguous()


def add_ranks_(x: Tensor, group: str) -> None:
    """Sum x over the ranks in place, in float32 (float64): only each rank's part and the result are rounded."""
    total = x.to(wide_dtype(x))
    torch.distributed.all_reduce(total, group=_named(group))
    x.copy_(total)


def _named(group: Any) -> ProcessGroup:
    """The group of a name: an op cannot take the group itself."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group)

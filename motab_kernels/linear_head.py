"""A language-model head: logits from hidden states, some positions at a time; and the divergence between two.

N positions, n at a time, H hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from motab_kernels.divergence_kernels import DivergenceKernels, divergence_forward
from motab_kernels.tensors import wide_dtype

#: Bytes in work at a time: both sides' logits of a chunk of positions, and the gradients of CHUNKS chunks by the
#: student's logits, which go into the other matrix products together, because each pass over a large weight costs.
BUDGET = 1 << 30
CHUNKS = 5

#: Rows of a weight, or of a gradient, that are converted to float32 at a time.
SLICE = 4096


class Head(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), of the same dtype
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0  # 0 is none

    def logits(self, part: slice) -> Tensor:
        """Logits at some positions, (n, V) in float32 (float64 for float64). Rounded to bfloat16 they would lose the
        difference between two models that nearly agree, and with it a divergence's gradient."""
        x = product(self.hidden[part], self.weight)
        if self.bias is not None:
            x += self.bias
        if self.scale != 1.0:
            x *= self.scale
        return x.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else x


class HeadDivergence(NamedTuple):
    """The divergence between two heads, at some positions at a time."""

    student: Head
    teacher: Head
    keep: Tensor | None  # (N,)
    tau: Tensor | None  # 0-d or (N,)
    kind: str
    lam: float
    vocab_size: int
    kernels: DivergenceKernels

    def forward(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both sides' logits (n, V) at some positions, their losses, and what the gradient needs besides."""
        s, t = self.student.logits(part), self.teacher.logits(part)
        keep = None if self.keep is None else self.keep[part]
        shared = self._shared(s), self._shared(t)
        return s, t, *divergence_forward(self.kernels, *shared, self._tau(part), keep, self.kind, self.lam)

    def write_gradient(self, part: slice, s: Tensor, t: Tensor, saved: Tensor, scale: Tensor, out: Tensor) -> None:
        """d(sum of scale * divergence) by the head's matrix product, rounded once to the dtype of `out` (n, V)."""
        shared = self._shared(s), self._shared(t)
        scale, softcap = scale * self.student.scale, self.student.softcap
        self.kernels.divergence_gradient(
            *shared, self._tau(part), saved, scale, self.kind, self.lam, self._shared(out), softcap
        )
        out[:, self.vocab_size :].zero_()

    def _shared(self, x: Tensor) -> Tensor:
        """(n, V) as (B, T, V) with T = 1, of the columns that count."""
        return x[:, None, : self.vocab_size]

    def _tau(self, part: slice) -> Tensor | None:
        return self.tau if self.tau is None or self.tau.dim() == 0 else self.tau[part]


def chunk_size_for(student_weight: Tensor, teacher_weight: Tensor) -> int:
    """The number of positions whose logits, with the student's gradients, fit into the budget."""
    V, item = student_weight.shape[0], student_weight.element_size()
    wide = wide_dtype(student_weight).itemsize
    copies = 2 if item == 2 and student_weight.device.type == "cpu" else 1  # PyTorch's 16-bit product there makes one
    position = (V + teacher_weight.shape[0]) * wide + V * item * CHUNKS * copies
    size = max(1, BUDGET // position)
    return size if size < 64 else size // 64 * 64  # a matrix product works in tiles


def as_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments as `torch.nn.functional.linear` takes them: in autocast's dtype where it is on."""
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off; of a meta device, which it does not know, any context."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in float32 (float64 for float64)."""
    if hidden.dtype in (torch.float32, torch.float64):
        return F.linear(hidden, weight)
    if hidden.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    x = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
    wide = hidden.float()
    for rows, out in zip(weight.split(SLICE), x.split(SLICE, 1), strict=True):
        torch.mm(wide, rows.float().T, out=out)
    return x

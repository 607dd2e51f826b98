"""A language-model head: logits from hidden states, some positions at a time.

n positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

#: Rows of a weight that are widened at a time where no matrix product takes 16 bits and gives 32.
SLICE = 4096


class Head(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), of the same dtype
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0  # 0 is none

    def logits(self, part: slice) -> Tensor:
        """Of some positions, (n, V) in float32 (float64 for float64): rounded to bfloat16, logits lose what sets two
        models apart that nearly agree, and a divergence's gradient with it."""
        x = product(self.hidden[part], self.weight)
        if self.bias is not None:
            x += self.bias
        if self.scale != 1.0:
            x *= self.scale
        return x.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else x


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `torch.nn.functional.linear` takes them: in autocast's dtype where it is on."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


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

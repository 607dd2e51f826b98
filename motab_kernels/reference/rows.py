"""Shared by the definitions: rows of logits (R, V), some at a time."""

from torch import Tensor

#: Logits of one side that are processed at a time: they stay in a core's cache, and the temporaries are bounded.
CHUNK = 1 << 19


def row_sums(x: Tensor) -> Tensor:
    """Sum (R, V) over V. A single row is summed twice, because torch splits a sum with one output among its threads:
    the row's value would depend on the size of its batch."""
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)


def relative(logits: Tensor, tau: Tensor | None) -> Tensor:
    """(R, V) logits minus their maximum, divided by the temperature."""
    x = logits - logits.amax(-1, keepdim=True)
    return x if tau is None else x.div_(tau[:, None].to(x.dtype))

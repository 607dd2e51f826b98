"""What the definitions share: rows of logits (R, V), some at a time."""

from torch import Tensor

#: Logits of one side in work at a time: what stays in a core's cache, and a bound on the temporaries.
CHUNK = 1 << 19


def row_sums(x: Tensor) -> Tensor:
    """Sum (R, V) over V. A lone row is summed twice: torch splits a sum with a single output among its threads, and
    the row's value would then depend on the size of its batch."""
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)


def relative(logits: Tensor, tau: Tensor | None) -> Tensor:
    """(R, V) logits less their maximum, over the temperature."""
    x = logits - logits.amax(-1, keepdim=True)
    return x if tau is None else x.div_(tau[:, None].to(x.dtype))

"""`sample_from_logits`: a token for each row of logits, by temperature, top-k, top-p and min-p, without a sort.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from motab_kernels.backend import choose_backend, implementation
from motab_kernels.sampling_checks import check_settings, check_tensors, check_values
from motab_kernels.tensors import is_traced

__all__ = ["Samples", "sample_from_logits"]


class Samples(NamedTuple):
    """What `sample_from_logits` returns, shaped like its uniforms."""

    token_ids: Tensor  # int64; where not valid, any
    valid: Tensor  # bool: False where the logits hold NaN or +inf, or only -inf, so that nothing can be drawn


def sample_from_logits(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    backend: str | None = None,
) -> Samples:
    """Draw a token from each row of logits, with a random number given for each: inverse transform sampling.

    Equivalent, for a row of logits (V,) and its number u, where `weights` are relative to the likeliest token's::

        x = logits.float()
        if top_k: x[x < x.topk(min(top_k, V)).values[-1]] = -inf
        ordered = x.sort(descending=True).values
        shares = softmax(ordered / temperature, 0).cumsum(0)
        x[x < ordered[(shares >= top_p).nonzero()[0]]] = -inf          # if top_p < 1
        weights = exp((x - x.max()) / temperature)
        weights[weights < min_p] = 0
        sums = weights.cumsum(0)
        token = (sums > u * sums[-1]).nonzero()[0]

    so the filters apply in the order of transformers, each to the distribution that the one before leaves; each keeps
    what is as likely as the least likely token that it must keep. The token is found in the vocabulary's order, so that
    two models that nearly agree draw the same token from the same number more often than in an order of their own.

    The kernels do not sort: they search for the least logit that is kept. Batch invariant: a row's token does not
    depend on other rows. Not differentiable. On a GPU one launch, and the host does not wait.

    Args:
        logits: (B, V) or (B, T, V); float32, bfloat16 or float16; "torch" also takes float64, and computes in it. Any
            strides; the kernels copy a tensor whose vocabulary is not contiguous.
        uniforms: (B,) or (B, T) float64 in [0, 1). Checked on the CPU only, where they are used.
        temperature: divides the logits: 1e-30 to 1e30, or 0 for the likeliest token, the first of several; the filters
            and the numbers have no effect then.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        top_p: in (0, 1]: keep the fewest likeliest tokens whose probabilities sum to at least this.
        min_p: in [0, 1]: keep tokens with at least this share of the likeliest one's probability.
        backend: "triton" (on a GPU), "cpu" (C++) or "torch". None: the kernels of the device where they are installed
            and the logits are not float64, else "torch".

    Returns:
        `Samples`. A token of weight 0 is never drawn. Between backends a token can differ where its number, or a
        filter's limit, lies within rounding (1e-6) of a sum of weights.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit; on the CPU a number out of range.

    Source: Holtzman et al. (arXiv 1904.09751), section 3.1, for top-p; Nguyen et al. (arXiv 2407.01082), section 3, for
    min-p.
    """
    check_settings(temperature, top_k, top_p, min_p)
    check_tensors(logits, uniforms)
    backend = choose_backend(backend, logits)
    run = sample_from_logits_op if is_traced(logits, uniforms) else _sample
    numbers = float(temperature), min(top_k, logits.shape[-1]), float(top_p), float(min_p)
    return Samples(*run(logits.detach(), uniforms.detach(), *numbers, backend))


def _sample(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, backend: str
) -> tuple[Tensor, Tensor]:
    if temperature == 0:
        found = logits.argmax(-1, keepdim=True)
        return found.squeeze(-1), logits.gather(-1, found).squeeze(-1).isfinite()
    tokens, valid = _empty(uniforms)
    if uniforms.numel() == 0:
        return tokens, valid
    if backend != "torch":  # of a tensor that is negated only when it is read, the memory holds other values
        logits = logits.resolve_neg()
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    elif uniforms.device.type == "cpu":
        check_values(uniforms)
    draw = implementation("sampling", backend, logits.device).sample_from_logits
    draw(logits, uniforms, temperature, top_k, top_p, min_p, tokens, valid)
    return tokens, valid


def _empty(uniforms: Tensor) -> tuple[Tensor, Tensor]:
    tokens = uniforms.new_empty(uniforms.shape, dtype=torch.int64)
    return tokens, torch.empty_like(tokens, dtype=torch.bool)


sample_from_logits_op = torch.library.custom_op("motab_kernels::sample_from_logits", _sample, mutates_args=())


@sample_from_logits_op.register_fake
def _(logits: Tensor, uniforms: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _empty(uniforms)

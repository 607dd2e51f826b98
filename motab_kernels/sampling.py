"""`sample_from_logits`: a token for each row of logits, by temperature, top-k, top-p and min-p, without a sort.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from motab_kernels.backend import choose_backend, implementation
from motab_kernels.sampling_checks import check_row_settings, check_settings, check_tensors, check_values
from motab_kernels.tensors import is_traced

__all__ = ["Samples", "sample_from_logits"]


class Samples(NamedTuple):
    """What `sample_from_logits` returns, shaped like its uniforms."""

    token_ids: Tensor  # int64; where not valid, any
    valid: Tensor  # bool: False where nothing can be drawn: NaN or +inf, only -inf, or a setting that does not fit


def sample_from_logits(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
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

    Each of the four settings is a number for all rows, or a tensor on the device of the logits: (B,), one for each row,
    whose T tokens share it, or 0-d. A row draws the token that it would by the same numbers. On a GPU a tensor that is
    not contiguous is copied, by one more launch, and its values may change between replays of a CUDA graph. They are
    checked on the CPU only: on a GPU a row with one out of range is not `valid`.

    Args:
        logits: (B, V) or (B, T, V); float32, bfloat16 or float16; "torch" also takes float64, and computes in it. Any
            strides; the kernels copy a tensor whose vocabulary is not contiguous.
        uniforms: (B,) or (B, T) float64 in [0, 1). Checked on the CPU only, and not if the temperature is the number 0.
        temperature: divides the logits: 1e-30 to 1e30, or 0 for the likeliest token, the first of several; the filters
            and the numbers have no effect then. Tensor: float32 or float64.
        top_k: keep this many of the likeliest tokens; 0 keeps all, and so does what exceeds V. Tensor: int32 or int64.
        top_p: in (0, 1]: keep the fewest likeliest tokens whose probabilities sum to at least this. Tensor: float32 or
            float64.
        min_p: in [0, 1]: keep tokens with at least this share of the likeliest one's probability. Tensor: float32 or
            float64.
        backend: "triton" (on a GPU), "cpu" (C++) or "torch". None: the kernels of the device where they are installed
            and the logits are not float64, else "torch".

    Returns:
        `Samples`. A token of weight 0 is never drawn. Between backends a token can differ where its number, or a
        filter's limit, lies within rounding (1e-6) of a sum of weights.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit; on the CPU a value out of range in a tensor.

    Source: Holtzman et al. (arXiv 1904.09751), section 3.1, for top-p; Nguyen et al. (arXiv 2407.01082), section 3, for
    min-p.
    """
    check_tensors(logits, uniforms)
    settings: tuple[Any, ...] = temperature, top_k, top_p, min_p
    tensors = [x for x in settings if isinstance(x, Tensor)]
    if tensors:
        check_row_settings(logits, *settings)
    else:
        check_settings(*settings)
    given = (
        _of_rows(temperature, logits),
        _of_rows(top_k, logits) if isinstance(top_k, Tensor) else min(top_k, logits.shape[-1]),
        _of_rows(top_p, logits),
        _of_rows(min_p, logits),
    )
    backend = choose_backend(backend, logits)
    if is_traced(logits, uniforms, *tensors):
        numbers = (None if isinstance(x, Tensor) else x for x in given)
        rows = [x for x in given if isinstance(x, Tensor)]
        return Samples(*sample_from_logits_op(logits.detach(), uniforms.detach(), rows, *numbers, backend))
    return Samples(*_sample(logits.detach(), uniforms.detach(), given, backend))


def _of_rows(setting: float | Tensor, logits: Tensor) -> Any:
    return setting.resolve_neg().expand(logits.shape[0]) if isinstance(setting, Tensor) else float(setting)


def _sample(logits: Tensor, uniforms: Tensor, settings: Sequence[Any], backend: str) -> tuple[Tensor, Tensor]:
    """The settings are numbers or (B,)."""
    temperature = settings[0]
    if not isinstance(temperature, Tensor) and temperature == 0:
        found = logits.argmax(-1, keepdim=True)
        return found.squeeze(-1), logits.gather(-1, found).squeeze(-1).isfinite()
    tokens, valid = _empty(uniforms)
    if uniforms.numel() == 0:
        return tokens, valid
    if backend != "torch":  # of a tensor that is negated only when it is read, the memory holds other values
        logits, uniforms = logits.resolve_neg(), uniforms.resolve_neg()
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    if backend != "cpu" and uniforms.device.type == "cpu":  # C++ checks them itself
        check_values(uniforms, *settings)
    draw = implementation("sampling", backend, logits.device).sample_from_logits
    draw(logits, uniforms, *settings, tokens, valid)
    return tokens, valid


def _empty(uniforms: Tensor) -> tuple[Tensor, Tensor]:
    tokens = uniforms.new_empty(uniforms.shape, dtype=torch.int64)
    return tokens, torch.empty_like(tokens, dtype=torch.bool)


def _registered(
    logits: Tensor,
    uniforms: Tensor,
    tensors: Sequence[Tensor],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`_sample` with the next of the tensors for each setting that is None."""
    rows = iter(tensors)
    settings = [next(rows) if x is None else x for x in (temperature, top_k, top_p, min_p)]
    return _sample(logits, uniforms, settings, backend)


sample_from_logits_op = torch.library.custom_op("motab_kernels::sample_from_logits", _registered, mutates_args=())


@sample_from_logits_op.register_fake
def _(logits: Tensor, uniforms: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _empty(uniforms)

"""Sampling whose outcome depends on the sample and the position alone, never on the batch.

The random number of a token is a hash of (seed, sample, turn, position), so that replaying a position, in any
batch and any block, draws the same number; the token is found by inverting the cumulative distribution there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014): increment and the two multipliers of its finaliser.
_INCREMENT, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1
TIES = 64  # beyond `top_k`
PIECE = 512  # weights that are summed up one by one
LEAST_TEMPERATURE = 1e-30  # except 0; below this, logits of a few hundred overflow float32


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Filters apply in this order, as in transformers, each to the distribution the previous one left, renormalised.

    Args:
        temperature: 0 is greedy, and the filters have no effect; else at least `LEAST_TEMPERATURE`.
        top_k: draw from the k likeliest tokens, and up to `TIES` more as likely as the last of them; None or 0: from
            all.
        top_p: in (0, 1]: draw from the fewest likeliest tokens whose probabilities sum to at least this.
        min_p: in [0, 1]: draw from tokens with at least this share of the likeliest one's probability; None is 0.

    Raises:
        ValueError: a setting out of range.
    """

    temperature: float
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None

    def __post_init__(self) -> None:
        temperature = self.temperature
        if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
            raise ValueError(
                f"temperature must be a finite number of at least {LEAST_TEMPERATURE}, or 0 for greedy, got "
                f"{temperature}"
            )
        top_k = 0 if self.top_k is None else self.top_k
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
            raise ValueError(
                f"top_k must be an integer of at least 0, where 0 and None stand for all tokens, got {self.top_k!r}"
            )
        if not 0 <= (self.min_p or 0) <= 1:
            raise ValueError(f"min_p must lie in 0 to 1, or be None for all tokens, got {self.min_p}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _mix(value: int) -> int:
    value = (value + _INCREMENT) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def stream_key(seed: int, sample: int, turn: int) -> int:
    """The signed 64-bit key of the random numbers of one writer's turn in one sample."""
    return _signed(_mix(_mix(_mix(seed & _MASK) ^ sample) ^ turn))


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1) for each (key, position), both int64: SplitMix64's output number ``position``."""

    def shifted(value: Tensor, bits: int) -> Tensor:  # a logical shift: int64's own carries the sign along
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    value = keys + (positions + 1) * _signed(_INCREMENT)
    value = (value ^ shifted(value, 30)) * _signed(_MIX_1)
    value = (value ^ shifted(value, 27)) * _signed(_MIX_2)
    return shifted(value ^ shifted(value, 31), 11).double() * 2.0**-53


def choose(logits: Tensor, numbers: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row of (B, V) logits.

    Args:
        logits: (B, V), any floating dtype.
        numbers: (B,) float64 in [0, 1), see `uniform`; unused if greedy.
        sampling: the settings.

    Returns:
        (B,) int64 tokens, and (B,) bool: whether the logits can be drawn from. If they hold NaN or infinity, or only
        -inf, they cannot, and the token is meaningless.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        return tokens.squeeze(-1), logits.gather(-1, tokens).squeeze(-1).isfinite()
    scaled, candidates = logits.float() / sampling.temperature, None
    if sampling.top_k:
        # A few candidates instead of the vocabulary, in its order: a sort of all takes longer than a small model.
        V = scaled.shape[-1]
        likeliest, found = scaled.topk(min(sampling.top_k + TIES, V))
        least = likeliest[:, min(sampling.top_k, V) - 1, None]
        candidates, places = found.sort(-1)
        scaled = likeliest.masked_fill(likeliest < least, -math.inf).gather(-1, places)
    probabilities = torch.softmax(scaled, -1)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
        last, _ = _first_at(ordered, torch.full_like(numbers[:, None], sampling.top_p), beyond=False)
        needless = torch.arange(ordered.shape[-1], device=ordered.device) > last
        needless = torch.empty_like(needless).scatter_(-1, places, needless)
        probabilities = probabilities.masked_fill(needless, 0.0)
    if sampling.min_p:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    # In the vocabulary's order: two models that nearly agree then draw the same token more often than in their own.
    # Beyond the number, and not at it, so that a token without probability is never drawn.
    index, total = _first_at(probabilities, numbers[:, None], beyond=True)
    tokens = index if candidates is None else candidates.gather(-1, index)
    return tokens.squeeze(-1), total.squeeze(-1) > 0  # it is NaN if any logit is, or their maximum is not finite


def _first_at(weights: Tensor, shares: Tensor, *, beyond: bool) -> tuple[Tensor, Tensor]:
    """The first place in each row of (B, N) weights at which their sum so far reaches a share of the whole sum, or is
    beyond it; and the whole sum. All (B, 1), shares and sums float64.

    A long row is summed in pieces, of which only one is then searched: running sums of all would be as large as the
    logits in float64, and a GPU would take a thousand of a row at a time, longer than for all else here.
    """
    N = weights.shape[-1]
    if N <= 4 * PIECE:
        sums = weights.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(sums, shares * sums[:, -1:], right=beyond).clamp(max=N - 1), sums[:, -1:]
    pieces = F.pad(weights, (0, -N % PIECE)).unflatten(-1, (-1, PIECE))
    ends = pieces.sum(-1, dtype=torch.float64).cumsum(-1)
    targets = shares * ends[:, -1:]
    piece = torch.searchsorted(ends, targets, right=beyond).clamp(max=ends.shape[-1] - 1)
    rest = targets - F.pad(ends, (1, 0)).gather(-1, piece)
    sums = pieces.gather(1, piece[..., None].expand(-1, -1, PIECE)).squeeze(1).cumsum(-1, dtype=torch.float64)
    # Both sums of the piece may differ by rounding; the factor is 1 less the smallest that makes a number smaller.
    rest = torch.minimum(rest, sums[:, -1:] * (1 - 2.0**-53) if beyond else sums[:, -1:])
    place = piece * PIECE + torch.searchsorted(sums, rest, right=beyond)
    return place.clamp(max=N - 1), ends[:, -1:]

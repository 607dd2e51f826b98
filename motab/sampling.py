"""Sampling whose outcome depends on the sample and the position alone, never on the batch.

The random number of a token is a hash of (seed, sample, writer, position), so that replaying a position, in any
batch and any block, draws the same number; the token is found by inverting the cumulative distribution there.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014): increment and the two multipliers of its finaliser.
_INCREMENT, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _mix(value: int) -> int:
    value = (value + _INCREMENT) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def stream_key(seed: int, sample: int, writer: int) -> int:
    """The signed 64-bit key of one writer's random numbers in one sample."""
    return _signed(_mix(_mix(_mix(seed & _MASK) ^ sample) ^ writer))


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1) for each (key, position), both int64: SplitMix64's output number ``position``."""

    def shifted(value: Tensor, bits: int) -> Tensor:  # a logical shift: int64's own carries the sign along
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    value = keys + (positions + 1) * _signed(_INCREMENT)
    value = (value ^ shifted(value, 30)) * _signed(_MIX_1)
    value = (value ^ shifted(value, 27)) * _signed(_MIX_2)
    return shifted(value ^ shifted(value, 31), 11).double() * 2.0**-53


def choose(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token a row of (B, V) logits; ``temperature=0`` is greedy.

    Args:
        logits: (B, V), any floating dtype.
        numbers: (B,) float64 in [0, 1), see `uniform`; greedy looks at none.
        temperature: >= 0.
        top_p: in (0, 1]: sample among the fewest likeliest tokens that hold at least this probability.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1).double()
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    # `right=True` finds the first entry above the target, so a token without probability is never drawn.
    target = numbers[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)

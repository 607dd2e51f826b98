"""Sampling whose outcome depends on the sample and the position alone, never on the batch.

The random number of a token is a hash of (seed, sample, turn, position), so that replaying a position, in any
batch and any block, draws the same number, and from the same logits the same token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import motab_kernels as mk
from motab_kernels.sampling_checks import check_settings

# SplitMix64 (Steele, Lea, Flood 2014): increment and the two multipliers of its finaliser.
_INCREMENT, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits, see `motab_kernels.sample_from_logits`.

    Args:
        temperature: 0 is greedy, and the filters have no effect.
        top_k: None or 0: all tokens.
        top_p: in (0, 1]; 1: all tokens.
        min_p: None or 0: all tokens.

    Raises:
        ValueError: a setting out of range.
    """

    temperature: float
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None

    def __post_init__(self) -> None:
        check_settings(**self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": self.top_p,
            "min_p": self.min_p or 0.0,
        }

    def draw(self, logits: Tensor, numbers: Tensor) -> mk.Samples:
        """A token for each row of (..., V) logits and its number in [0, 1), see `uniform`."""
        return mk.sample_from_logits(logits, numbers, **self._settings)


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

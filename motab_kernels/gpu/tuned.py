"""Measured settings, by a device's name and an op, as `python -m benchmarks.tune` writes them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, TypeVar

import torch

FILE = Path(__file__).with_name("tuned.json")
Settings = TypeVar("Settings", bound=Any)


@functools.cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(FILE.read_text())


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def tuned(op: str, device: torch.device, default: Settings, hip: Settings) -> Settings:
    """The default, or on an AMD GPU `hip`, overridden by what was measured on such a device."""
    if device.type != "cuda":
        return default
    default = hip if torch.version.hip else default
    if not table():
        return default
    index = torch.cuda.current_device() if device.index is None else device.index
    return default._replace(**table().get(_name(index), {}).get(op, {}))

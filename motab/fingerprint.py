"""What a run was begun with, so that one that continues it can be compared with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from motab.policies import Policy
from motab.prompts import Prompt
from motab.sharding import whole_tensors

_ELEMENTS = 1024  # of each weight, about
_MODELS = ("student", "teacher")  # settings that are a model's weights


def policy_settings(policy: Policy) -> dict[str, Any]:
    """The policy's class name and each of its settings."""
    return {"policy": type(policy).__name__} | {f"policy {name}": value for name, value in asdict(policy).items()}


def hash_of_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts as JSON, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def hash_of_weights(model: nn.Module | None) -> str | None:
    """SHA-256 of each weight's shape and of evenly spaced elements, which a training changes; None without a model.

    The name of a model does not matter, nor its device or how many processes share it; each of these calls this."""
    if model is None:
        return None
    found = hashlib.sha256()
    for weight in whole_tensors(model):
        step = weight.numel() // _ELEMENTS | 1  # odd, so that not all lie in one column
        elements = weight.detach().reshape(-1)[::step].cpu().contiguous()
        found.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
        found.update(elements.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, as "seed: 3 there, 4 now" or "student: other weights"; empty if none does. A missing
    setting equals None."""

    def shown(settings: Mapping[str, Any], name: str) -> str:
        if name in _MODELS and settings.get(name):
            return "one"
        return repr(settings[name]) if name in settings else "not set"

    def told(name: str) -> str:
        if name in _MODELS and before.get(name) and now.get(name):
            return f"{name}: other weights"
        return f"{name}: {shown(before, name)} there, {shown(now, name)} now"

    return ", ".join(told(name) for name in sorted({*before, *now}) if before.get(name) != now.get(name))

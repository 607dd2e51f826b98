"""What a run was begun with, so that one that continues it can be compared with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from motab.policies import Policy
from motab.prompts import Prompt


def policy_settings(policy: Policy) -> dict[str, Any]:
    """The policy's class name and each of its settings."""
    return {"policy": type(policy).__name__} | {f"policy {name}": value for name, value in asdict(policy).items()}


def hash_of_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts as JSON, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, as "seed: 3 there, 4 now"; empty if none does. A missing setting equals None."""

    def shown(settings: Mapping[str, Any], name: str) -> str:
        return repr(settings[name]) if name in settings else "not set"

    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {shown(before, name)} there, {shown(now, name)} now" for name in names)

"""Replace the functions that a peer's code calls by ours, and undo it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, ParamSpec

Undo = Callable[[], None]
P = ParamSpec("P")


class Target(NamedTuple):
    module: str
    name: str  # "function", or "Class.method"
    replacement: Any


def patch(peer: str, targets: list[Target]) -> Undo:
    """Replace all targets, or none and raise; returns a function that restores the originals.

    Patches of one peer nest: they are undone last first. Undoing twice does nothing.

    Args:
        peer: package and version that the targets were read from, as "trl 1.16": what an error names.

    Raises:
        ValueError: the peer cannot be imported, or has no such function, or one that takes other parameters.
    """
    found = [(*find(peer, target), target.replacement) for target in targets]
    for owner, name, _, replacement in found:
        setattr(owner, name, replacement)

    def undo() -> None:
        while found:
            owner, name, original, _ = found.pop()
            setattr(owner, name, original)

    return undo


def as_context(patch: Callable[P, Undo]) -> Callable[P, AbstractContextManager[None]]:
    """A peer's `patched`, which takes what its `patch` takes."""

    @contextmanager
    def patched(*args: P.args, **keywords: P.kwargs) -> Iterator[None]:
        """`patch()`, undone at the end of a `with` block, also by an exception."""
        undo = patch(*args, **keywords)
        try:
            yield
        finally:
            undo()

    return patched


def find(peer: str, target: Target) -> tuple[Any, str, Any]:
    """The owner of a target's attribute, its name there, and its value: a staticmethod itself, not its function."""
    try:
        owner: Any = importlib.import_module(target.module)
    except ImportError as error:
        raise ValueError(f"{target.module}: expected {peer} to be installed, got {error}") from error
    *classes, name = target.name.split(".")
    for part in classes:
        owner = getattr(owner, part, None)
    original = vars(owner).get(name) if owner is not None else None
    if original is None:
        raise ValueError(f"{target.module}.{target.name}: expected it to exist, as in {peer}, got none")
    expected, got = _parameters(target.replacement), _parameters(original)
    if expected != got:
        raise ValueError(f"{target.module}.{target.name}: expected parameters {expected}, as in {peer}, got {got}")
    return owner, name, original


def _parameters(function: Any) -> list[str]:
    """The names, without keyword-only ones, of which ours may have more."""
    function = getattr(function, "__func__", function)
    return [x.name for x in inspect.signature(function).parameters.values() if x.kind is not x.KEYWORD_ONLY]

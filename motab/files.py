"""Files that are whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` on success, so readers never see a partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    temporary.replace(path)


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """Yield a text file open for writing, renamed to `path` on success."""
    with whole_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def write_whole(path: str | Path, text: str) -> None:
    """Write a text to `path`; readers never see a part of it."""
    with whole_file(path) as file:
        file.write(text)

"""Files that are whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_path(path: str | Path) -> Iterator[Path]:
    """Another name to write under, of what has its own once the block is left without an error: nobody finds half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    temporary.replace(path)


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """The same as a file of text, open."""
    with whole_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def write_whole(path: str | Path, text: str) -> None:
    """Write beside the file under another name, then rename."""
    with whole_file(path) as file:
        file.write(text)

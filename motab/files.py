"""Files that are whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """A file to write, which has its name once the block is left without an error: nobody finds half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
    temporary.replace(path)


def write_whole(path: str | Path, text: str) -> None:
    """Write beside the file under another name, then rename."""
    with whole_file(path) as file:
        file.write(text)

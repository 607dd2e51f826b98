"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write beside the file under another name, then rename: nobody finds half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

"""A file that one process writes at a time."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # elsewhere than on Unix
    fcntl = None  # type: ignore[assignment]


class Lock:
    """Held from construction until `release`, or until this object or its process is gone.

    Raises:
        ValueError: another process holds it.
    """

    def __init__(self, path: Path):
        self.place = path.with_name(path.name + ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.file = self.place.open("a+", encoding="utf-8")
            if not self._takes(path):
                return
            # A former holder may have removed the file between its opening and the lock: that of nobody else then.
            if self.place.exists() and os.path.samestat(os.fstat(self.file.fileno()), self.place.stat()):
                break
            self.file.close()
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()

    def _takes(self, path: Path) -> bool:
        """Lock the open file; False where there are no locks, or where this process has it already."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.seek(0)
            holder = self.file.read()
            self.file.close()
            if holder != str(os.getpid()):  # this process may have left an iteration over the file unfinished
                raise ValueError(
                    f"{path} is being written by another process ({holder}); wait for it to end, or give another path"
                ) from error
            return False
        except OSError:  # a file system without locks
            return False
        return True

    def release(self) -> None:
        if hasattr(self, "file") and not self.file.closed:
            self.place.unlink(missing_ok=True)
            self.file.close()

    __del__ = release

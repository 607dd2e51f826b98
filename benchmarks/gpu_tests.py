"""pytest's verdicts on the tests that need a GPU, by several processes."""

from __future__ import annotations

import collections
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKERS = 8
NO_TESTS = 5  # pytest's exit status where a process has no share
ENDED = (0, 1, NO_TESTS)


class Share:
    """A process with a share of the tests. After a test that ends it, or after which the GPU gives only errors, another
    goes on with the next."""

    def __init__(self, arguments: tuple[str, ...], log: Path, index: int, count: int):
        # Warnings of other versions are not failures of the kernels.
        options = ["-v", "-W", "default", "-p", "no:cacheprovider", "-p", "benchmarks.shard"]
        self.command = [sys.executable, "-u", "-m", "pytest", *options, "--continue-on-collection-errors", *arguments]
        self.log, self.place = log.with_name(f"{log.name}.{index}"), log.with_name(f"{log.name}.{index}.at")
        self.environment = {**os.environ, "MOTAB_SHARD": f"{index}/{count}", "MOTAB_SHARD_AT": str(self.place)}
        self.begin()

    def begin(self) -> None:
        self.since = self.at()
        with self.log.open("a") as file:
            streams: Any = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.environment, **streams)

    def at(self) -> str:
        """The number and the name of the test that began last."""
        return self.place.read_text() if self.place.exists() else ""

    def goes_on(self) -> bool:
        code = self.process.poll()
        if code is None:
            return True
        if code in ENDED or self.at() == self.since:  # nothing ran: it would end so again
            return False
        with self.log.open("a") as file:
            file.write(f"\nthe process ended with {code}\n{self.at().partition(' ')[2]} BROKE\n")
        self.begin()
        return True

    def stop(self) -> bool:
        """Whether it had to be stopped."""
        if self.process.poll() is not None:
            return False
        os.killpg(self.process.pid, signal.SIGKILL)  # its children too
        self.process.wait()
        return True

    def text(self) -> str:
        """What it said; its files go."""
        text = self.log.read_text(errors="replace")
        self.log.unlink()
        self.place.unlink(missing_ok=True)
        return text


def run_tests(arguments: tuple[str, ...], log: Path, seconds: float) -> dict[str, Any]:
    """The tests' verdicts, by processes that each take a share of them, since compiling keeps a core of the host busy;
    read line by line, so that a test that hangs does not lose those of others."""
    deadline = time.monotonic() + seconds
    count = min(WORKERS, os.cpu_count() or 1)
    shares = [Share(arguments, log, index, count) for index in range(count)]
    checks: dict[str, Any] = {}
    try:
        while any([share.goes_on() for share in shares]) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        if any([share.stop() for share in shares]):
            checks["error"] = f"stopped after {seconds:.0f} s, see {log.name}"
    codes = {share.process.returncode for share in shares}
    wrong = codes if codes == {NO_TESTS} else codes - {*ENDED}
    if wrong and not checks:
        checks["error"] = f"pytest ended with {', '.join(map(str, sorted(wrong)))}, see {log.name}"
    text = "".join([share.text() for share in shares])
    log.write_text(text)
    verdicts = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|BROKE)", text, re.MULTILINE)
    unread = re.findall(r"^ERROR (\S+\.py)(?: |$)", text, re.MULTILINE)
    wrong_names = [name for name, verdict in verdicts if verdict in ("FAILED", "ERROR", "BROKE")] + unread
    counts = collections.Counter(verdict for _, verdict in verdicts)
    found = {"passed": counts["PASSED"], "skipped": counts["SKIPPED"], "failed": [*dict.fromkeys(wrong_names)]}
    return found | checks

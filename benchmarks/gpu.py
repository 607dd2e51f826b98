"""Every test and benchmark that needs a GPU, in one command from the repository's root.

    python -m benchmarks.gpu --out DIR [--minutes 9]

Runs the tests that need a GPU, then races every op beside eager, torch.compile and the peers that are installed. Needs
torch, triton, transformers, accelerate, numpy, pytest, pytest-benchmark and matplotlib; motab itself need not be
installed. DIR gets results.json (everything), table.md, boundary.png and losses.png, which are complete at any time and
rewritten after each stage, and the tests' output. Each stage is a process of its own with a share of the time, so that
its failure does not stop the others.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_report
from benchmarks.files import whole_path
from benchmarks.gpu_races import STAGES, Plan, Record

ROOT = Path(__file__).parents[1]
#: What only a GPU can show comes first, and last what takes longest: a hundred compiled variants against float64.
TESTS = (
    "-m",
    "gpu",
    "tests/motab_kernels/test_gpu.py",
    "tests/motab_kernels/test_gpu_graphs.py",
    "tests/motab/test_engine.py",
    "tests/motab/test_compiled_writer.py",
    "tests/motab_kernels/test_compiled.py",
)
WORKERS = 8  # processes for the tests
NO_TESTS = 5  # pytest's exit status where a process has no share
#: Shares of the time that is left after the tests.
SHARES = {"device": 3, "boundary": 5, "attention": 3, "sampling": 2, "divergence": 5, "linear": 3, "scaling": 2}
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "numpy")


def run(out: Path, minutes: float, command: str, plan: Plan | None = None, tests: tuple[str, ...] = TESTS) -> Record:
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    results: Record = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "versions": {"python": platform.python_version(), **installed(), "torch": torch.__version__},  # with its CUDA's
        "checks": {"passed": 0, "skipped": 0, "failed": [], "error": "not run yet"},
        "records": [],
    }
    write(results, out)
    results["checks"] = run_tests(tests, out / "tests.txt", 60 * minutes / 2)
    write(results, out)
    left = dict(SHARES)
    for stage in STAGES:
        seconds = (deadline - time.monotonic()) * left[stage] / sum(left.values())
        del left[stage]
        for record in in_a_process(stage, plan or Plan(), seconds):
            results["records"].append(record)
            print(json.dumps(record), flush=True)
        write(results, out)
    return results


def installed() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def run_tests(arguments: tuple[str, ...], log: Path, seconds: float) -> Record:
    """pytest's verdicts, by several processes that each take a share of the tests, since compiling keeps a core of the
    host busy; read line by line, so that a test that hangs does not lose those of others."""
    deadline = time.monotonic() + seconds
    # Warnings of other versions are not failures of the kernels.
    options = ["-v", "-W", "default", "-p", "no:cacheprovider", "-p", "benchmarks.shard"]
    command = [sys.executable, "-u", "-m", "pytest", *options, "--continue-on-collection-errors", *arguments]
    count = min(WORKERS, os.cpu_count() or 1)
    parts = [log.with_name(f"{log.name}.{index}") for index in range(count)]
    running, checks = [], Record()
    for index, part in enumerate(parts):
        with part.open("w") as file:
            shard = {**os.environ, "MOTAB_SHARD": f"{index}/{count}"}
            streams: Any = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            running.append(subprocess.Popen(command, cwd=ROOT, env=shard, **streams))
    try:
        codes = {pytest.wait(max(0.0, deadline - time.monotonic())) for pytest in running}
        wrong = codes if codes == {NO_TESTS} else codes - {0, 1, NO_TESTS}
        if wrong:
            checks["error"] = f"pytest ended with {', '.join(map(str, sorted(wrong)))}, see {log.name}"
    except subprocess.TimeoutExpired:
        checks["error"] = f"stopped after {seconds:.0f} s, see {log.name}"
    finally:
        for pytest in running:
            if pytest.poll() is None:
                os.killpg(pytest.pid, signal.SIGKILL)  # its children too
                pytest.wait()
    text = "".join(part.read_text() for part in parts)
    log.write_text(text)
    for part in parts:
        part.unlink()
    verdicts = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    unread = re.findall(r"^ERROR (\S+\.py)(?: |$)", text, re.MULTILINE)
    names = {verdict: [name for name, v in verdicts if v == verdict] for _, verdict in verdicts}
    return {
        "passed": len(names.get("PASSED", [])),
        "skipped": len(names.get("SKIPPED", [])),
        "failed": [*dict.fromkeys(names.get("FAILED", []) + names.get("ERROR", []) + unread)],
    } | checks


def in_a_process(stage: str, plan: Plan, seconds: float) -> Iterator[Record]:
    """The stage's records, with one more if it was stopped or failed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(stage, plan, sender))
    process.start()
    sender.close()  # our end; otherwise the end of the process would go unnoticed
    deadline = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            yield receiver.recv()
        yield {"op": "stage", "stage": stage, "error": f"stopped after its share of the time, {seconds:.0f} s"}
    except EOFError:
        process.join(10)
        if process.exitcode:  # None: it has sent everything, and is slow to end
            yield {"op": "stage", "stage": stage, "error": f"ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def serve(stage: str, plan: Plan, sender: multiprocessing.connection.Connection) -> None:
    try:
        for record in STAGES[stage](plan):
            sender.send(record)
    except Exception as error:
        sender.send({"op": "stage", "stage": stage, "error": f"{type(error).__name__}: {error}"[:400]})


def write(results: Record, out: Path) -> None:
    """The files are complete at any time: after a kill the last ones remain."""
    for name, text in (("results.json", json.dumps(results, indent=1)), ("table.md", gpu_report.table(results))):
        with whole_path(out / name) as unfinished:
            unfinished.write_text(text.rstrip("\n") + "\n")
    try:
        gpu_report.plots(results, out)
    except Exception as error:  # the numbers matter more
        print(f"no plots: {type(error).__name__}: {error}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a GPU, got none")
    run(options.out, options.minutes, f"python -m benchmarks.gpu --out {options.out}")
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()

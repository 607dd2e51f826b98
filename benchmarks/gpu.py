"""Every test and benchmark that needs a GPU, in one command from the repository's root.

    python -m benchmarks.gpu --out DIR [--minutes 9]

Runs the tests that need a GPU, then races every op beside eager, torch.compile and the peers that are installed. Needs
torch, triton, transformers, accelerate, numpy, pytest, pytest-benchmark and matplotlib; motab itself need not be
installed. DIR gets results.json (everything), table.md, boundary.png and losses.png, which are complete at any time and
rewritten after each stage, and the tests' output. Each stage is a process of its own with a share of the time, so that
its failure does not stop the others, and where a trial of it breaks the process or the GPU's context, the next one runs
in a process anew.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import multiprocessing.connection
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_report
from benchmarks.files import whole_path
from benchmarks.gpu_races import STAGES, Plan, Record, run_trial
from benchmarks.gpu_tests import run_tests
from benchmarks.timing import gpu_is_lost

#: What only a GPU can show comes first, and last what takes longest: a hundred compiled variants against float64.
TESTS = (
    "-m",
    "gpu",
    "tests/motab_kernels/test_gpu.py",
    "tests/motab_kernels/test_gpu_graphs.py",
    "tests/motab/test_gpu_runs.py",
    "tests/motab/test_compiled_writer.py",
    "tests/motab_kernels/test_compiled.py",
)
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
    try:
        results["checks"] = run_tests(tests, out / "tests.txt", 60 * minutes / 2)
    except Exception as error:  # the races do not depend on it
        results["checks"]["error"] = f"{type(error).__name__}: {error}"
    write(results, out)
    left = dict(SHARES)
    for stage in STAGES:
        seconds = (deadline - time.monotonic()) * left[stage] / sum(left.values())
        del left[stage]
        for record in in_a_process(stage, plan or Plan(), seconds):
            results["records"].append(record)
            write_numbers(results, out)
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


def in_a_process(stage: str, plan: Plan, seconds: float) -> Iterator[Record]:
    """The stage's records, with one more if it was stopped or failed. If a trial ends the process, takes half the time
    or leaves a GPU that gives only errors, another process goes on with the next."""
    deadline = time.monotonic() + seconds
    done = 0
    while True:
        receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(stage, plan, done, sender))
        process.start()
        sender.close()  # our end; otherwise the end of the process would go unnoticed
        first, begun = done, None
        try:
            while receiver.poll(max(0.0, min(seconds / 2, deadline - time.monotonic()))):
                message = receiver.recv()
                if message is None:
                    return
                begun, record = message
                if record is not None:
                    done, begun = done + 1, None
                    yield record
            why = f"stopped after half of the stage's time, {seconds / 2:.0f} s"
        except (EOFError, OSError):
            process.join(10)
            why = f"its process ended with {process.exitcode}"
        finally:
            process.kill()
            process.join(10)
        if time.monotonic() >= deadline:
            yield failed(stage, f"stopped after its share of the time, {seconds:.0f} s")
            return
        if begun is not None:
            done += 1
            yield begun | {"error": why}
        elif done == first:
            yield failed(stage, why)
            return


def serve(stage: str, plan: Plan, skipped: int, sender: multiprocessing.connection.Connection) -> None:
    """Send a pair for each trial behind those that are skipped, when it begins, and again with its results; None after
    the last."""
    try:
        for trial in itertools.islice(STAGES[stage](plan), skipped, None):
            sender.send((trial.record, None))
            sender.send((trial.record, run_trial(trial)))
            if gpu_is_lost():
                return
    except Exception as error:
        sender.send((None, failed(stage, f"{type(error).__name__}: {error}"[:400])))
    sender.send(None)


def failed(stage: str, why: str) -> Record:
    return {"op": "stage", "stage": stage, "error": why}


def write(results: Record, out: Path) -> None:
    """The files are complete at any time: after a kill the last ones remain."""
    write_numbers(results, out)
    try:
        write_text(out / "table.md", gpu_report.table(results))
        gpu_report.plots(results, out)
    except Exception as error:  # the numbers matter more
        print(f"no table or plots: {type(error).__name__}: {error}", file=sys.stderr)


def write_numbers(results: Record, out: Path) -> None:
    write_text(out / "results.json", json.dumps(results, indent=1))


def write_text(path: Path, text: str) -> None:
    with whole_path(path) as unfinished:
        unfinished.write_text(text.rstrip("\n") + "\n")


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

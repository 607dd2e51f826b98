"""A pytest plugin for `benchmarks.gpu_tests`: with MOTAB_SHARD=2/8, every eighth test from the third on, or those of
them behind the one that is named in MOTAB_SHARD_AT, a file that is told which test runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from benchmarks.timing import gpu_is_lost

AT = Path(os.environ["MOTAB_SHARD_AT"])
SECONDS = 120  # after which a test's process is killed, and another goes on: it cannot end a kernel that hangs
NUMBER, WHY = pytest.StashKey[int](), pytest.StashKey[list[str]]()  # a test's place in the share; why it failed


@pytest.hookimpl(trylast=True)  # when markers have chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    index, count = map(int, os.environ["MOTAB_SHARD"].split("/"))
    done = int(AT.read_text().split()[0]) + 1 if AT.exists() else 0
    items[:] = items[index::count]
    for number, item in enumerate(items):
        item.stash[NUMBER] = number
    del items[:done]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    AT.write_text(f"{item.stash[NUMBER]} {item.nodeid}")
    signal.alarm(SECONDS)
    item.stash[WHY] = []
    result = yield
    signal.alarm(0)
    # At once: pytest says it at the end, which a process that is killed does not reach.
    for text in item.stash[WHY]:
        item.config.get_terminal_writer().line(f"\n{text}")
    if gpu_is_lost():
        item.session.shouldstop = "the GPU gives only errors"
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test also fails of what its kernels do after it has returned."""
    result = yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[WHY].append(report.longreprtext)
    return report

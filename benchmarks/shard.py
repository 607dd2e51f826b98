"""A pytest plugin for `benchmarks.gpu`: with MOTAB_SHARD=2/8, every eighth test from the third on."""

import os

import pytest


@pytest.hookimpl(trylast=True)  # when markers have chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    index, count = map(int, os.environ["MOTAB_SHARD"].split("/"))
    items[:] = items[index::count]

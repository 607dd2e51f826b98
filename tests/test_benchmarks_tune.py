"""`python -m benchmarks.tune` without a GPU: what it chooses, what it writes, and that the kernels read it."""

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.bench_attention import Case
from motab_kernels.gpu import attention, boundary, divergence, sampling, tuned


@pytest.fixture
def file(monkeypatch, tmp_path):
    """A table of its own, on a machine whose GPUs are called so."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuned, "FILE", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: f"GPU of kind {index}")
    for cached in (tuned.table, tuned._name):
        cached.cache_clear()
    yield path
    for cached in (tuned.table, tuned._name):
        cached.cache_clear()


def test_settings_are_read_by_device_and_op(file):
    settings = boundary.Settings(lanes=256, per_lane=8, tiles=2, num_warps=8, sums=64)
    tune.write(file, "GPU of kind 1", {"boundary": settings, "divergence": None})
    tune.write(file, "another GPU", {"boundary": settings})
    assert sorted(json.loads(file.read_text())) == ["GPU of kind 1", "another GPU"]
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]
    assert boundary.settings_for(torch.device("cuda", 1)) == settings
    default = boundary.HIP if torch.version.hip else boundary.DEFAULT
    assert boundary.settings_for(torch.device("cuda", 0)) == default
    assert boundary.settings_for(torch.device("cpu")) == boundary.DEFAULT
    default = divergence.HIP if torch.version.hip else divergence.DEFAULT
    assert divergence.settings_for(torch.device("cuda", 1)) == default


def misfits(table):
    """Entries that name no op, or a field that its settings lack."""
    modules = {"attention": attention, "boundary": boundary, "divergence": divergence, "sampling": sampling}
    return [
        (device, op, field)
        for device, ops in table.items()
        for op, fields in ops.items()
        for field in fields
        if op not in modules or field not in modules[op].Settings._fields
    ]


def test_the_committed_table_fits():
    assert misfits(json.loads(tuned.FILE.read_text())) == []  # empty until a GPU was measured, hence:
    planted = {
        "a GPU": {"boundary": {"lanes": 1, "lane": 1}, "bound": {"lanes": 1}},
        "another": {"attention": {"split": 1}},
    }
    assert misfits(planted) == [("a GPU", "boundary", "lane"), ("a GPU", "bound", "lanes")]


def test_the_fastest_that_passes_is_chosen():
    """Settings in force are the candidate's; a failure costs nothing but itself; what was in force comes back."""
    before = divergence.settings_for
    choices = [divergence.Settings(tiles=tiles) for tiles in (1, 2, 3, 4)]

    def times():
        tiles = divergence.settings_for(torch.device("cpu")).tiles
        if tiles == 3:
            raise AssertionError("gradient off by 1")
        yield from {1: (2.0, 2.0), 2: (1.0, 3.0), 4: (2.0, 3.0)}[tiles]

    assert tune.best(divergence, choices, times) == choices[1]
    assert divergence.settings_for is before
    assert tune.best(divergence, choices[2:3], times) is None


def test_candidates_begin_with_the_default():
    for choices, default, least in (
        (tune.candidates, boundary.DEFAULT, 20),
        (tune.attention_candidates, attention.DEFAULT, 20),
        (tune.sampling_candidates, sampling.DEFAULT, 3),
        (tune.sampling_candidates, sampling.HIP, 2),
    ):
        found = list(choices(default))
        assert found[0] == default
        assert len(found) == len(set(found)) > least


def test_times_on_a_cpu():
    assert len(list(tune.boundary_times((1, 2), 50, "cpu"))) == 2
    assert len(list(tune.divergence_times(3, 50, "cpu"))) == len(tune.KINDS)
    assert len(list(tune.sampling_times((1, 2), 50, "cpu"))) == 6
    assert len(list(tune.attention_times((Case(2, 1, 40), Case(2, 3, 40)), "cpu"))) == 2

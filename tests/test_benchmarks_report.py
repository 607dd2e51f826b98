"""`python -m benchmarks.report` on a run of pytest-benchmark: ratios, what is left out, the picture."""

import json

import pytest

from benchmarks import report

RUN = {
    "datetime": "2026-11-24T10:00:00+00:00",
    "machine_info": {"cpu": {"brand_raw": "a fast one"}, "node": "a name that is nobody's business"},
    "benchmarks": [
        {"group": "boundary", "name": "test[ours]", "params": {"provider": "ours"}, "extra_info": {"GB/s": 20.0}},
        {"group": "boundary", "name": "test[eager]", "params": {"provider": "eager"}, "extra_info": {"peak MiB": 12.3}},
        {"group": "writing", "name": "test[ours]", "params": {"provider": "ours"}, "extra_info": {"tokens": 8}},
        {"group": "writing", "name": "test[few]", "params": {"provider": "few"}, "extra_info": {"tokens": 4}},
        {"group": None, "name": "test_ragged", "params": None, "extra_info": {}},
        *(
            {
                "group": "by size",
                "name": "test_scaling",
                "params": {},
                "extra_info": {"op": "boundary", "provider": provider, "B": B, "T": T, "V": V},
            }
            for provider in ("ours", "eager")
            for B, T, V in ((1, 1, 8), (2, 1, 8), (1, 2, 8), (1, 1, 16))
        ),
    ],
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    run = json.loads(json.dumps(RUN))
    for i, benchmark in enumerate(run["benchmarks"]):
        benchmark["stats"] = {"median": 0.001 * (i + 1) ** 2}
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(run))
    monkeypatch.setattr(report, "copy_tb_s", lambda device, size: 0.02)
    report.main([str(path), "--out", str(tmp_path / "results")])
    return tmp_path / "results"


def test_table(results):
    """Eager's 4 ms are 4 times ours; the scaling is in the picture alone."""
    text = (results / "cpu.md").read_text()
    assert "| boundary | ours | 1 | 1.00 | 20 |  |  |" in text
    assert "| boundary | eager | 4 | 4.00 |  | 12 |  |" in text
    assert "| test_ragged | test_ragged | 25 |  |  |  |  |" in text
    assert "by size" not in text
    assert "copy GB/s 20.0" in text


def test_tokens_are_what_is_compared(results):
    """8 tokens in our 9 ms against 4 in 16: a token takes 3.56 times as long."""
    text = (results / "cpu.md").read_text()
    assert "| writing | ours | 9 | 1.00 |  |  | 889 |" in text
    assert "| writing | few | 16 | 3.56 |  |  | 250 |" in text


def test_json_says_what_ran_and_not_where(results):
    text = (results / "cpu.json").read_text()
    assert "nobody's business" not in text
    published = json.loads(text)
    assert published["machine"]["date"] == "2026-11-24"
    assert published["records"][1] == {"case": "boundary", "provider": "eager", "ms": 4.0, "peak MiB": 12.3}
    assert len(published["records"]) == 13


def test_picture_and_nothing_unfinished(results):
    assert sorted(path.name for path in results.iterdir()) == ["cpu-scaling.png", "cpu.json", "cpu.md"]
    assert (results / "cpu-scaling.png").read_bytes().startswith(b"\x89PNG")

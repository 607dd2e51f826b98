"""`python -m benchmarks.gpu` without a GPU: its stages on the CPU at tiny sizes, and what it writes."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_attention,
    bench_boundary,
    bench_divergence,
    bench_linear_divergence,
    bench_sampling,
    gpu,
    gpu_races,
    gpu_report,
    gpu_tests,
    timing,
)
from benchmarks.bench_attention import Case
from benchmarks.gpu_races import STAGES, Plan, Trial, run_trial

TINY = Plan(
    device="cpu",
    providers=("ours", "ours, buffers given", "eager", "transformers", "absent"),
    boundary=((2, 1, 50, torch.bfloat16), (2, 3, 50, torch.float32)),
    scaling=((3, 1, 40, torch.bfloat16),),
    attention=((Case(3, 2, 40, half=True), torch.float32),),
    sampling=((2, 50, torch.float32),),
    divergence=(5, 60, torch.bfloat16),
    kinds=("forward_kl", "jsd", "tvd"),
    linear=(6, 8, 40, torch.float32),
)


def records_of(stage, plan=TINY, seconds=0.0):
    return map(run_trial, STAGES[stage](plan))


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(gpu, "in_a_process", records_of)


def test_its_tests_are_all_that_need_a_gpu():
    """But those of kernels that the far-apart tensors test, which takes long, and its own."""
    root = Path(__file__).parents[1]
    left_out = {"tests/test_benchmarks_gpu.py", "tests/motab_kernels/test_far_apart.py"}
    found = {str(path.relative_to(root)) for path in root.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()}
    assert {name for name in gpu.TESTS if name.endswith(".py")} == found - left_out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize("stage", STAGES)
def test_stages_on_a_gpu(stage, monkeypatch):
    """Whatever is installed runs, in CUDA graphs too, each call once and not as often as a timing takes."""
    providers = (*TINY.providers, "ours, in a CUDA graph", "liger", "trl", "fla")
    monkeypatch.setattr(timing, "CALLS_IN_A_GRAPH", 1)
    monkeypatch.setattr(gpu_races, "copy_tb_s", lambda device: 1.0)
    for module in (gpu_races, timing):
        monkeypatch.setattr(module, "median_ms", lambda calls, device, seconds=0: calls[-1]() is Ellipsis or 0.1)
    records = list(records_of(stage, TINY._replace(device="cuda", providers=providers)))
    errors = {(r["case"], r["provider"]): r["error"] for r in records if "error" in r}
    assert all(error.startswith("ModuleNotFoundError") for error in errors.values()), errors
    assert records


def test_stages(monkeypatch):
    """Each case with each provider that can run here; what is not installed says so."""

    def absent(*example):
        raise ModuleNotFoundError("No module named 'peer'")

    for module in (bench_attention, bench_boundary, bench_divergence, bench_linear_divergence, bench_sampling):
        monkeypatch.setitem(module.PROVIDERS, "absent", absent)
    records = [r for name in STAGES for r in records_of(name) if name != "device"]
    losses = [f"{kind} {passes}, 5 x 60 bf16" for kind in TINY.kinds for passes in ("forward", "forward + backward")]
    ours = ["ours", "eager", "absent"]
    chunks = [f"products, {n} x {2**30 // (40 * (8 + 4 * n)) // 64 * 64}" for n in (1, 2, 3, 5, 8)]
    given = "ours, buffers given"
    expected = {
        "B=2 T=1 V=50 bf16": [*ours, given],
        "B=2 T=3 V=50 fp32": [*ours, given],
        "B = 3, T = 2, S = 40, half of the rows, fp32": ["ours", "transformers", "absent"],
        "B=3 T=1 V=40 bf16": ["eager", "absent", given],
        **{f"B=2 V=50 {kept} fp32": [*ours, "transformers"] for kept in bench_sampling.FILTERS},
        **dict.fromkeys(losses, ours),
        **{f"{kind} forward + backward, 6 x 8 x 40 fp32": [*ours, "products", *chunks] for kind in TINY.linear_kinds},
    }
    assert sorted((r["case"], r["provider"]) for r in records) == sorted(
        (case, name) for case, names in expected.items() for name in names
    )
    for r in records:
        if r["provider"] == "absent":
            assert r["error"] == "ModuleNotFoundError: No module named 'peer'"
            assert "ms" not in r
        else:
            assert r["ms"] > 0


def test_what_compiles_races_last(monkeypatch):
    """In every stage of many cases, so that time that runs out costs no other provider's figures."""
    modules = bench_boundary, bench_sampling, bench_divergence, bench_linear_divergence, bench_attention
    for module in modules:
        name = "flex_attention" if module == bench_attention else "torch.compile"
        monkeypatch.setitem(module.PROVIDERS, name, module.PROVIDERS["ours"])
    plan = TINY._replace(
        providers=("ours", "torch.compile", "flex_attention"),
        attention=((Case(3, 2, 40), torch.float32), (Case(2, 1, 30), torch.float32)),
    )
    for stage, cases in (("boundary", 2), ("attention", 2), ("sampling", 3), ("divergence", 6), ("linear", 2)):
        names = [r["provider"] for r in records_of(stage, plan) if not r["provider"].startswith("products")]
        assert names[:cases] == ["ours"] * cases
        assert names[cases:] in (["torch.compile"] * cases, ["flex_attention"] * cases)


def test_a_wrong_kernel_has_no_figure_and_costs_no_other(monkeypatch):
    def wrong(kind, student, teacher):
        return bench_divergence.eager(kind, student, teacher) * 1.1

    monkeypatch.setitem(bench_divergence.PROVIDERS, "ours", lambda: wrong)

    def shifted(*inputs):
        return [x + 1e-2 for x in bench_boundary.eager(*inputs)]

    monkeypatch.setitem(bench_boundary.PROVIDERS, "ours", lambda *example: shifted)
    records = [r for name in ("boundary", "divergence") for r in records_of(name)]
    for r in records:
        if r["provider"] == "ours":
            assert r["error"].startswith("AssertionError")
            assert "ms" not in r
        elif r["provider"] == "eager":
            assert r["ms"] > 0


def test_run_writes_everything(tmp_path, in_this_process):
    tests = tmp_path / "test_of_a_gpu.py"
    tests.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_no(): pass\n"
    )
    out = tmp_path / "out"
    results = gpu.run(out, 5.0, "the command", TINY, (str(tests),))
    assert sorted(x.name for x in out.iterdir()) == [
        "boundary.png",
        "losses.png",
        "results.json",
        "table.md",
        "tests.txt",
    ]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    checks = results["checks"]
    assert (checks["passed"], checks["skipped"]) == (1, 1)
    assert [name.split("::")[1] for name in checks["failed"]] == ["test_bad"]
    assert results["versions"]["torch"] == torch.__version__
    text = (out / "table.md").read_text()
    assert "1 passed, 1 skipped, 1 failed" in text
    assert "FAILED" in text
    assert "| boundary | B=2 T=1 V=50 bf16 | ours, buffers given |" in text
    assert text.count("not measured") == len(gpu_report.TARGETS) - 2  # but the least leads of any cases


def test_tests_that_do_not_end_keep_the_verdicts_of_the_others(tmp_path):
    tests = tmp_path / "test_of_a_gpu.py"
    tests.write_text("import time\ndef test_good(): pass\ndef test_endless(): time.sleep(100)\n")
    checks = gpu_tests.run_tests((str(tests),), tmp_path / "tests.txt", 8.0)
    assert checks == {"passed": 1, "skipped": 0, "failed": [], "error": "stopped after 8 s, see tests.txt"}


def test_every_test_has_one_process(tmp_path, monkeypatch):
    """Also where processes are more than tests; a marker chooses before they share."""
    monkeypatch.setattr(gpu_tests, "WORKERS", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    tests = tmp_path / "test_of_a_gpu.py"
    for count in (1, 5):
        tests.write_text(
            "import os, pathlib, pytest\n"
            "@pytest.mark.filterwarnings('ignore')\n"
            f"@pytest.mark.parametrize('i', range({count}))\n"
            f"def test_it(i): pathlib.Path('{tmp_path}', f'{{i}} of {count}').write_text(str(os.getpid()))\n"
            "def test_of_no_mark(): assert 0\n"
        )
        checks = gpu_tests.run_tests(("-m", "filterwarnings", str(tests)), tmp_path / "tests.txt", 60.0)
        assert checks == {"passed": count, "skipped": 0, "failed": []}
        processes = [path.read_text() for path in tmp_path.glob(f"* of {count}")]
        assert len(processes) == count
        assert len(set(processes)) == min(count, 2)
    checks = gpu_tests.run_tests(("-m", "timeout", str(tests)), tmp_path / "tests.txt", 60.0)
    assert checks["error"] == "pytest ended with 5, see tests.txt"


BREAKING = """
import os, pathlib, time, benchmarks.shard
benchmarks.shard.SECONDS, lost = 3, []
benchmarks.shard.gpu_is_lost = lambda: bool(lost)
def test_good(): pass
def test_bad(): assert 0, "the reason"
def test_dies(): os._exit(7)
def test_late(): pass
def test_loses_the_gpu(): lost.append(1)
def test_later(): pass
def test_hangs(): time.sleep(100)
def test_last(): pass
"""


def test_a_test_that_breaks_its_process_costs_no_other(tmp_path, monkeypatch):
    """One that ends it, one after which a GPU gives only errors, one that hangs; why another failed is not lost."""
    monkeypatch.setattr(gpu_tests, "WORKERS", 1)
    tests, log = tmp_path / "test_of_a_gpu.py", tmp_path / "tests.txt"
    tests.write_text(BREAKING)
    checks = gpu_tests.run_tests((str(tests),), log, 60.0)
    names = [name.split("::")[1] for name in checks.pop("failed")]
    assert names == ["test_bad", "test_dies", "test_loses_the_gpu", "test_hangs"]
    assert checks == {"passed": 5, "skipped": 0}  # one of which lost the GPU when it was over
    assert "AssertionError: the reason" in log.read_text()
    assert [x.name for x in tmp_path.iterdir() if x.suffix == ".at"] == []


def test_a_file_that_cannot_be_read_keeps_no_other_from_running(tmp_path):
    (tmp_path / "test_broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "test_whole.py").write_text("def test_good(): pass\n")
    checks = gpu_tests.run_tests((str(tmp_path),), tmp_path / "tests.txt", 60.0)
    assert checks["passed"] == 1
    assert [Path(name).name for name in checks["failed"]] == ["test_broken.py"]


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def loses_the_gpu():
    gpu.gpu_is_lost = lambda: True  # in this process
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def late():
    return {"ms": 2, "in a process anew": not gpu.gpu_is_lost()}


@pytest.mark.filterwarnings("ignore:This process")  # Python 3.12, of a fork
def test_a_trial_that_breaks_its_process_costs_no_other(monkeypatch):
    """One that ends it, one after which a GPU gives only errors, one that hangs."""
    bodies = {"good": lambda: {"ms": 1}, "dies": dies, "lost": loses_the_gpu, "late": late}
    bodies |= {"hangs": lambda: time.sleep(100), "last": lambda: {"ms": 3}}
    trials = [Trial({"provider": name}, body) for name, body in bodies.items()]
    monkeypatch.setattr(gpu, "STAGES", {"race": lambda plan: iter(trials)})
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    found = {r.pop("provider"): r for r in gpu.in_a_process("race", TINY, 8.0)}
    assert found == {
        "good": {"ms": 1},
        "dies": {"error": "its process ended with -9"},
        "lost": {"error": "RuntimeError: CUDA error: an illegal memory access was encountered"},
        "late": {"ms": 2, "in a process anew": True},
        "hangs": {"error": "stopped after half of the stage's time, 4 s"},
        "last": {"ms": 3},
    }


def test_a_stage_in_a_process_of_its_own():
    """One that ends, one that breaks, one that is stopped."""
    assert list(gpu.in_a_process("device", TINY, 60.0)) == [{"op": "device", "name": "cpu"}]
    (broken,) = gpu.in_a_process("boundary", TINY._replace(boundary=(1,)), 60.0)
    assert broken["op"] == "stage"
    assert broken["error"].startswith("TypeError")
    (stopped,) = gpu.in_a_process("device", TINY, 0.0)
    assert stopped["error"] == "stopped after its share of the time, 0 s"


def test_a_kill_leaves_the_last_whole_file(tmp_path, monkeypatch, in_this_process):
    results = gpu.run(tmp_path, 5.0, "the command", TINY._replace(boundary=(), kinds=()), ("--version",))
    before = (tmp_path / "results.json").read_text()
    write_text = Path.write_text

    def half(path, text):
        write_text(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        gpu.write(results | {"date": "later"}, tmp_path)
    assert (tmp_path / "results.json").read_text() == before


def test_numbers_are_written_whatever_becomes_of_the_table(tmp_path, monkeypatch, capsys):
    """And with each record, not only when its stage is over."""
    written = []

    def records(stage, plan, seconds):
        yield {"op": stage}
        written.append(json.loads((tmp_path / "results.json").read_text())["records"][-1])

    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(gpu, "in_a_process", records)
    monkeypatch.setattr(gpu_report, "table", broken)
    monkeypatch.setattr(gpu, "run_tests", broken)
    results = gpu.run(tmp_path, 5.0, "the command")
    assert written == results["records"] == [{"op": stage} for stage in STAGES]
    assert results["checks"]["error"] == "ZeroDivisionError: "
    assert "no table or plots: ZeroDivisionError" in capsys.readouterr().err


def test_targets(tmp_path):
    """The table's verdicts, from times that are known."""
    case = "B=64 T=1 V=151936 bf16"
    races = [
        ("boundary", case, gpu_report.OURS, 0.0171),
        ("boundary", case.replace("64", "1", 1), gpu_report.OURS, 0.0123),
        ("boundary", case, "eager", 0.0342),
        ("boundary", case.replace("64", "1", 1), "torch.compile", 0.0246),
        ("divergence", gpu_report.JSD, "ours", 5.0),
        ("divergence", gpu_report.JSD, "torch.compile", 5.5),
        ("linear", gpu_report.LINEAR, "ours", 110.0),
        ("linear", gpu_report.LINEAR, "products", 100.0),
    ]
    sizes = {"call_ms": 0.03, "peak_mib": 1100}
    records = [{"op": op, "case": case, "provider": name, "ms": ms, **sizes} for op, case, name, ms in races]
    checks = {"passed": 1, "skipped": 0, "failed": []}
    text = gpu_report.table({"date": "", "command": "", "versions": {}, "checks": checks, "records": records})
    rows = [line for line in text.splitlines() if line.endswith(("| met |", "| missed |", "| not measured | |"))]
    assert [line.split("|")[3].strip() for line in rows] == [
        "17.1 us",
        "12.3 us",
        "2.00",
        "1.00",
        "not measured",
        "not measured",
        "not measured",
        "1.10",
        "1.10",
        "1.15 GB",
    ]
    assert [line.split("|")[4].strip() for line in rows] == [
        *("met", "missed", "met", "missed", "", "", "", "missed", "met", "met")
    ]


def test_needs_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "out")])
    assert "expected a GPU, got none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

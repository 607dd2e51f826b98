"""What the compilers make of the Triton kernels, by `benchmarks.static`; no GPU is needed.

On an H100 at 3 TB/s a bfloat16 pair leaves about 38 issue slots: memory sets the pace only well below that.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Kernels of the boundary that follow its pass over the vocabulary.
DECIDING = ("combine", "decide", "walk")


@pytest.fixture(scope="module")
def reports():
    """By (kernel, dtype, target). In a process of its own, because this one may have the interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.static", "--json"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=root)
    return {(r["kernel"], r["dtype"], r["target"]): r for r in json.loads(run.stdout)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kernel", "dtype"), [("partial", "fp32"), *((x, "bf16") for x in ("partial", *DECIDING))])
def test_registers(reports, kernel, dtype, target):
    report = reports[kernel, dtype, target]
    assert report["spilled"] == 0
    assert 0 < report["registers"] <= 168  # three blocks of 128 threads a multiprocessor, at least


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "loads"), [("fp32", 8), ("bf16", 4)])
def test_passes_over_the_vocabulary(reports, dtype, loads, target):
    """16 columns of both sides a lane: 128 bits at a time, and nothing that waits for another lane."""
    passes = [r for r in reports.values() if (r["dtype"], r["target"]) == (dtype, target) and "special" in r]
    passes = [r for r in passes if r["kernel"] not in DECIDING]
    assert len(passes) == 22
    for report in passes:
        assert report["spilled"] == 0, report
        assert 0 < report["registers"] <= 168, report
        assert (report["wide_loads"], report["narrow_loads"]) == (loads, 0), report
        assert (report["barriers"], report["shuffles"]) == (0, 0), report


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kernel", "most", "special"),
    [
        ("partial", 23, 2.6),
        ("sums forward_kl", 17, 2.6),
        ("sums reverse_kl", 17, 2.6),
        ("sums normalisers", 13, 2.6),
        ("gradient forward_kl", 26, 2),
        ("gradient reverse_kl", 27, 2),
        ("gradient tvd", 26, 2),
        ("terms tvd", 22, 2),
        ("terms jsd", 36, 3),
        ("gradient jsd", 39, 3),
        ("terms jsd leaning", 40, 3),
        ("gradient jsd leaning", 43, 3),
        ("terms skew_forward_kl", 47, 4),
        ("gradient skew_forward_kl", 40, 3),
        ("terms skew_reverse_kl", 44, 4),
        ("gradient skew_reverse_kl", 48, 4),
    ],
)
def test_instructions_of_a_pair(reports, kernel, most, special, dtype, target):
    report = reports[kernel, dtype, target]
    assert most / 3 < report["instructions"] <= most
    assert 2 <= report["special"] <= special
    if kernel.startswith("gradient") and "leaning" not in kernel:
        capped = reports[f"{kernel} softcap", dtype, target]
        assert most / 3 < capped["instructions"] <= most + 3
        assert capped["special"] == report["special"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kernel", "least", "most"),
    [("top-k", 8, 16), ("top-p", 12, 17), ("top-k, top-p", 12, 17), ("settings of rows", 12, 17)],
)
def test_sampling(reports, kernel, least, most, dtype, target):
    """128 bits at a time, and in a pass that searches nothing that waits for another lane."""
    report, plain = reports[f"sample {kernel}", dtype, target], reports["sample all", dtype, target]
    assert report["spilled"] == plain["spilled"] == 0
    assert 0 < report["registers"] <= 64  # two rows of 512 threads a multiprocessor, at least
    assert least < report["search"] <= most
    assert report["wide_loads"] > plain["wide_loads"] >= 2
    assert report["narrow_loads"] == plain["narrow_loads"] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_attention(reports, target):
    """Keys and values are loaded 16 bytes at a time; on NVIDIA by copies that the tile before does not wait for."""
    found = [r for r in reports.values() if r["target"] == target and "copies" in r]
    assert len(found) == 9
    registers, shared = (512, 64 << 10) if target.startswith("gfx") else (255, 99 << 10)  # the least that a kind has
    for report in found:
        assert report["spilled"] == 0, report
        assert 0 < report["registers"] <= registers, report
        assert report["shared"] <= shared, report
        if report["kernel"].startswith("attention"):
            assert report["wide_loads"] >= report["needed"] > 0, report
            pages = report["kernel"].endswith("pages")  # whose number a tile loads; sm_100's loop has several turns
            assert pages <= report["narrow_loads"] <= pages * 1.5 * report["wide_loads"] / report["needed"], report
            assert report["copies"] == (0 if target.startswith("gfx") else report["wide_loads"]), report


@pytest.mark.parametrize("target", TARGETS)
def test_drafting_leaves_room_for_three_programs(reports, target):
    """Of 128 threads a multiprocessor, or of 256 in waves of 64: memory is waited for by one while others go on."""
    for pages in ("", ", pages"):
        report = reports[f"attention D=128 GROUP=4 T=1{pages}", "bf16", target]
        assert report["registers"] <= (256 if target.startswith("gfx") else 168)
        assert report["shared"] <= 54 << 10

"""Measure the kernels' settings on this GPU and keep the best ones as data.

    python -m benchmarks.tune [--out motab_kernels/gpu/tuned.json]

Each op's candidates are checked, then timed at several sizes; the one with the least geometric mean is written under
the device's name, next to the settings of other devices. Opt-in: nothing is measured when kernels are used.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from benchmarks import bench_attention, bench_boundary, bench_divergence, bench_sampling
from benchmarks.bench_attention import Case
from benchmarks.files import whole_path
from benchmarks.timing import median_ms, replayed_ms, rotations
from motab_kernels.gpu import attention, boundary, divergence, sampling
from motab_kernels.gpu.tuned import FILE

V = 151936
KINDS = ("forward_kl", "jsd")
LANES = (32, 64, 128, 256, 512)


def boundary_times(positions: tuple[int, ...] = (1, 64), vocabulary: int = V, device: str = "cuda") -> Iterator[float]:
    for B in positions:
        count = rotations(4 * B * vocabulary, device)
        batches = [bench_boundary.inputs((B,), vocabulary, torch.bfloat16, seed, device) for seed in range(count)]
        call = bench_boundary.in_place(*batches[0])
        bench_boundary.check(call, "ours", *batches[0])
        calls = [functools.partial(call, *batch) for batch in batches]
        yield replayed_ms(calls) if device == "cuda" else median_ms(calls, device)


def divergence_times(positions: int = 2048, vocabulary: int = V, device: str = "cuda") -> Iterator[float]:
    student, teacher = bench_divergence.inputs(positions, vocabulary, torch.bfloat16, device)
    for kind in KINDS:
        expected = exact(kind, positions, vocabulary, device)
        bench_divergence.check(bench_divergence.ours, kind, student, teacher, expected)

        def call(kind: str = kind) -> None:
            student.grad = None
            bench_divergence.ours(kind, student, teacher).backward()

        yield median_ms([call], device)


def attention_times(
    cases: tuple[Case, ...] = (Case(8, 1, 4096), Case(64, 1, 2048), Case(32, 16, 2048)), device: str = "cuda"
) -> Iterator[float]:
    for case in cases:
        x = bench_attention.inputs(case, torch.bfloat16, device)
        call = bench_attention.ours(x)
        bench_attention.check(call, x)
        yield replayed_ms([call]) if device == "cuda" else median_ms([call], device)


def sampling_times(rows: tuple[int, ...] = (8, 128), vocabulary: int = V, device: str = "cuda") -> Iterator[float]:
    for B, filters in itertools.product(rows, bench_sampling.FILTERS.values()):
        case = bench_sampling.inputs(B, vocabulary, torch.bfloat16, 0, device)
        bench_sampling.check(bench_sampling.ours, "ours", *case, *filters)
        calls = [functools.partial(bench_sampling.ours, *case, *filters)]
        yield replayed_ms(calls) if device == "cuda" else median_ms(calls, device)


@functools.cache
def exact(kind: str, positions: int, vocabulary: int, device: str) -> tuple[float, torch.Tensor]:
    return bench_divergence.exact(kind, *bench_divergence.inputs(positions, vocabulary, torch.bfloat16, device))


def candidates(default: Any) -> Iterator[Any]:
    """Settings of a pass over the vocabulary; the default first, so that it wins a tie."""
    yield default
    for lanes, per_lane, tiles, num_warps in itertools.product(LANES, (8, 16, 32), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        settings = default._replace(lanes=lanes, per_lane=per_lane, tiles=tiles, num_warps=num_warps)
        if lanes in (32 * num_warps, 64 * num_warps) and settings != default:
            yield settings


def attention_candidates(default: Any) -> Iterator[Any]:
    yield default
    for split, slots, num_warps, num_stages in itertools.product((128, 256, 512), (32, 64, 128), (4, 8), (2, 3, 4)):
        sizes = {"split": split, "slots": slots, "elements": 128 * slots}
        settings = default._replace(**sizes, num_warps=num_warps, num_stages=num_stages)
        if settings != default:
            yield settings


def sampling_candidates(default: Any) -> Iterator[Any]:
    """A lane a thread."""
    yield default
    for num_warps in (4, 8, 16, 32):
        lanes = num_warps * (default.lanes // default.num_warps)
        if num_warps != default.num_warps and lanes <= 1024:  # the most threads of a program
            yield default._replace(lanes=lanes, num_warps=num_warps)


def best(module: ModuleType, choices: Iterable[Any], times: Callable[[], Iterator[float]]) -> Any:
    """The settings with the least geometric mean of the times, without those that fail the check or do not compile."""
    found, least = None, math.inf
    for settings in choices:
        try:
            with mock.patch.object(module, "settings_for", lambda device, chosen=settings: chosen):
                cost = sum(math.log(x) for x in times())
        except Exception as error:
            print(f"{settings}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        print(f"{settings}: {cost:.4f}", flush=True)
        if cost < least:
            found, least = settings, cost
    return found


def write(out: Path, name: str, ops: dict[str, Any]) -> None:
    """Write the settings found for a device; those of other devices stay."""
    table = json.loads(out.read_text()) if out.exists() else {}
    table[name] = {op: settings._asdict() for op, settings in ops.items() if settings is not None}
    with whole_path(out) as unfinished:
        unfinished.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=FILE, help="the table to write to")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a GPU, got none")
    ops = {}
    for name, module, choices, times in (
        ("boundary", boundary, candidates, boundary_times),
        ("divergence", divergence, candidates, divergence_times),
        ("attention", attention, attention_candidates, attention_times),
        ("sampling", sampling, sampling_candidates, sampling_times),
    ):
        default = module.HIP if torch.version.hip else module.DEFAULT
        ops[name] = best(module, choices(default), times)
        write(options.out, torch.cuda.get_device_name(), ops)


if __name__ == "__main__":
    main()

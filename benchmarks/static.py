"""The machine code of the Triton kernels, inspected on a machine without a GPU.

    python -m benchmarks.static > benchmarks/results/static.md
    python -m benchmarks.static --json

Each kernel is compiled ahead of time for each target; the page says what the columns are. Run it without
TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.machine_code import (
    BARRIER,
    COPY,
    LOAD,
    SHUFFLE,
    SPECIAL,
    TARGETS,
    WIDE_LOAD,
    body,
    compiled,
    count,
    executed,
    inner_loops,
    lines_of,
    registers_and_spills,
)
from motab_kernels.gpu import attention, boundary, divergence, sampling

BYTES = {"fp32": 4, "bf16": 2}
V = 151936


class Device(NamedTuple):
    """Figures for predictions, from the makers' data sheets."""

    target: str
    units: int  # multiprocessors, compute units
    clock: float  # GHz
    lanes: int  # to which a unit issues per clock
    special: int  # special functions of a unit per clock
    bandwidth: float  # TB/s, nine tenths of the data sheet's


DEVICES = {
    "A100": Device("sm_80", 108, 1.41, 128, 16, 1.8),
    "H100": Device("sm_90", 132, 1.7, 128, 16, 3.0),
    "H200": Device("sm_90", 132, 1.7, 128, 16, 4.3),
    "B200": Device("sm_100", 148, 1.85, 128, 16, 7.2),
    "MI300X": Device("gfx942", 304, 2.1, 64, 16, 4.8),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """One kernel on one target; the loop's figures are 0 if the kernel has no loop over the vocabulary."""

    kernel: str
    dtype: str
    target: str
    registers: int
    spilled: int
    program: float = 0.0
    instructions: float = 0.0
    special: float = 0.0
    wide_loads: int = 0
    narrow_loads: int = 0
    barriers: int = 0
    shuffles: int = 0


@dataclasses.dataclass(frozen=True)
class SamplingReport:
    """One variant on one target; `search`: instructions of a logit in a pass that searches, in a loop without barriers;
    the loads are those of all passes."""

    kernel: str
    dtype: str
    target: str
    registers: int
    spilled: int
    search: float
    wide_loads: int
    narrow_loads: int


@dataclasses.dataclass(frozen=True)
class AttentionReport:
    """One kernel of ragged attention on one target; no figures of a loop if it does not read the cache."""

    kernel: str
    dtype: str
    target: str
    registers: int
    spilled: int
    shared: int
    tile: str = ""  # queries x slots
    needed: int = 0  # 128-bit loads of a thread for a tile of keys and one of values
    wide_loads: int = 0
    copies: int = 0
    narrow_loads: int = 0


#: Of a kernel that is compiled: its code is read when all are, see `machine_code.UNREAD`.
Pending = Callable[[], Any]


def loop_report(kernel: Any, name: str, dtype: str, target: str, settings: Any, constants: dict[str, Any]) -> Pending:
    """A pass over the vocabulary, whose logits are `dtype` and contiguous, with a temperature."""
    vector = 16 // BYTES[dtype]
    of_logits = ("student_ptr", "teacher_ptr", "out_ptr")
    types = {n: f"*{dtype}" if n in of_logits else "*fp32" for n in kernel.arg_names if n.endswith("_ptr")}
    types |= {"token_ptr": "*i64", "keep_ptr": "*i1", "lam": "fp32", "rest": "fp32", "per_cap": "fp32"}
    aligned = tuple(n for n in kernel.arg_names if re.match(r"(student|teacher|out)_stride_|V$", n))
    constants = constants | {
        "HAS_TEMPERATURE": True,
        "FAST": target.startswith("sm"),
        "GROUPS": settings.per_lane // vector,
        "LANES": settings.lanes,
        "VECTOR": vector,
        "TILES": settings.tiles,
    }
    binary = compiled(kernel, target, types, constants, settings.num_warps, aligned)

    def report() -> Report:
        lines = lines_of(binary, target)
        loop = body(lines)
        threads = settings.num_warps * TARGETS[target].warp_size
        pairs = settings.lanes * settings.per_lane / threads
        return Report(
            name,
            dtype,
            target,
            *registers_and_spills(binary, target),
            program=executed(lines, settings.tiles) / (settings.tiles * pairs),
            instructions=len(loop) / pairs,
            special=count(SPECIAL, loop) / pairs,
            wide_loads=count(WIDE_LOAD, loop),
            narrow_loads=count(LOAD, loop) - count(WIDE_LOAD, loop),
            barriers=count(BARRIER, loop),
            shuffles=count(SHUFFLE, loop),
        )

    return report


def partial_report(dtype: str, target: str) -> Pending:
    """The boundary's pass, with every output."""
    settings = boundary.HIP if target.startswith("gfx") else boundary.DEFAULT
    return loop_report(boundary.partial_kernel, "partial", dtype, target, settings, {})


def divergence_reports(dtype: str, target: str) -> Iterator[Pending]:
    """Both forward passes and the gradient, for each kind that is compiled apart; "jsd leaning": beta is not 1/2, and
    "softcap": the student's logits are capped."""
    settings = divergence.HIP if target.startswith("gfx") else divergence.DEFAULT
    for name in ("forward_kl", "reverse_kl", "normalisers"):
        constants = {"HAS_KEEP": True, "FORWARD": name == "forward_kl", "REVERSE": name == "reverse_kl"}
        yield loop_report(divergence.sums_kernel, f"sums {name}", dtype, target, settings, constants)
    for kind in ("jsd", "jsd leaning", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        constants = {"HAS_KEEP": True, "KIND": kind.split()[0], "EVEN": kind == "jsd"}
        yield loop_report(divergence.terms_kernel, f"terms {kind}", dtype, target, settings, constants)
    kinds = ("forward_kl", "reverse_kl", "jsd", "jsd leaning", "skew_forward_kl", "skew_reverse_kl", "tvd")
    for kind in (*kinds, *(f"{kind} softcap" for kind in kinds if kind != "jsd leaning")):
        constants = {"KIND": kind.split()[0], "EVEN": kind in ("jsd", "jsd softcap"), "HAS_SOFTCAP": "softcap" in kind}
        yield loop_report(divergence.gradient_kernel, f"gradient {kind}", dtype, target, settings, constants)


def decide_report(kernel: Any, name: str, target: str, constants: dict[str, Any]) -> Pending:
    """What follows the boundary's pass, with every option; it reads only the token's logits."""
    settings = boundary.HIP if target.startswith("gfx") else boundary.DEFAULT
    division = boundary.division(V, BYTES["bf16"], settings)
    doubles = ("scale_ptr", "theta_ptr", "scores_ptr", "history_ptr")
    types = {n: "*fp64" if n in doubles else "*fp32" for n in kernel.arg_names if n.endswith("_ptr")}
    types |= {"student_ptr": "*bf16", "teacher_ptr": "*bf16", "token_ptr": "*i64", "argmax_ptr": "*i64"}
    types |= {"counters_ptr": "*i32", "rank_ptr": "*i32", "ends_ptr": "*i1", "stray_ptr": "*i1"}
    constants = constants | {
        "SCORE": "value_ratio",
        "HAS_TEMPERATURE": True,
        "HAS_ENDS": True,
        "HAS_THETA": True,
        "HAS_DOUBT": True,
        "WINDOW": 8,
        "WINDOW_BLOCK": 8,
        "BLOCK": division["T_BLOCK"] if constants.get("COMBINE") else boundary.WALKED,
        **{name: division[name] for name in ("SPLIT", "S_BLOCK", "T_BLOCK")},
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    binary = compiled(kernel, target, types, constants, num_warps=1)
    return lambda: Report(name, "bf16", target, *registers_and_spills(binary, target))


def attention_report(
    dtype: str, target: str, D: int, GROUP: int, T: int, HAS_WINDOW: bool, softcap: bool, PAGE: int = 0
) -> Pending:
    settings = attention.HIP if target.startswith("gfx") else attention.DEFAULT
    kernel = attention.split_kernel
    split = attention.split_length(T * GROUP, settings)
    tiles = attention.blocks(T * GROUP, D, BYTES[dtype], math.gcd(split, PAGE), settings).copy()
    of_inputs = ("query_ptr", "keys_ptr", "values_ptr", "out_ptr")
    types = {n: f"*{dtype}" if n in of_inputs else "*fp32" for n in kernel.arg_names if n.endswith("_ptr")}
    types |= {"lengths_ptr": "*i64", "page_table_ptr": "*i64", "scale": "fp32", "softcap": "fp32"}
    aligned = tuple(n for n in kernel.arg_names if re.match(r"(query|keys|values|out)_stride_", n))
    flags = {"HAS_PAGE_TABLE": True, "HAS_SINKS": True, "HAS_SOFTCAP": softcap, "HAS_WINDOW": HAS_WINDOW}
    num_warps = tiles.pop("num_warps")
    constants = {
        **flags,
        "IS_SPLIT": settings.split_tokens >= T,
        "SPLIT": split,
        "PAGE": PAGE,
        "GROUP": GROUP,
        "D": D,
        **tiles,
    }
    if T == 1:
        constants["T"] = 1  # as in a launch
    binary = compiled(kernel, target, types, constants, num_warps, aligned, num_stages=settings.num_stages)

    def report() -> AttentionReport:
        loop = body(lines_of(binary, target))
        threads = num_warps * TARGETS[target].warp_size
        options = f"{', window' if HAS_WINDOW else ''}{', softcap' if softcap else ''}{', pages' if PAGE else ''}"
        return AttentionReport(
            f"attention D={D} GROUP={GROUP} T={T}{options}",
            dtype,
            target,
            *registers_and_spills(binary, target),
            binary.metadata.shared,
            f"{tiles['M_BLOCK']} x {tiles['N_BLOCK']}",
            2 * tiles["N_BLOCK"] * D * BYTES[dtype] // 16 // threads,
            count(WIDE_LOAD, loop),
            count(COPY, loop),
            count(LOAD, loop) - count(WIDE_LOAD, loop),
        )

    return report


def combine_report(target: str) -> Pending:
    settings = attention.HIP if target.startswith("gfx") else attention.DEFAULT
    kernel = attention.combine_kernel
    types = {"partial_ptr": "*fp32", "lengths_ptr": "*i64", "sinks_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = {"HAS_SINKS": True, "GROUP": 4, "D": 128, "D_BLOCK": 128}
    constants |= {"SPLIT": settings.split, "S_BLOCK": settings.splits}
    binary = compiled(kernel, target, types, constants, settings.num_warps)
    return lambda: AttentionReport(
        "combine D=128", "bf16", target, *registers_and_spills(binary, target), binary.metadata.shared
    )


def attention_reports() -> Iterator[Pending]:
    """A drafted token and a scored block for models like Qwen3, gpt-oss and Gemma 2; both with splits of several pages,
    and a prompt in pages, not split."""
    for target in TARGETS:
        for T in (1, 16):
            for PAGE in (0, 64):
                yield attention_report("bf16", target, 128, 4, T, HAS_WINDOW=False, softcap=False, PAGE=PAGE)
        yield attention_report("fp32", target, 128, 4, 16, HAS_WINDOW=False, softcap=False)
        yield attention_report("bf16", target, 64, 8, 16, HAS_WINDOW=True, softcap=False)
        yield attention_report("bf16", target, 256, 2, 16, HAS_WINDOW=True, softcap=True)
        yield attention_report("bf16", target, 128, 4, 256, HAS_WINDOW=False, softcap=False, PAGE=256)
        yield combine_report(target)


def sampling_report(
    dtype: str, target: str, name: str, HAS_TOP_K: bool, HAS_TOP_P: bool, of_rows: bool = False
) -> Pending:
    settings = sampling.HIP if target.startswith("gfx") else sampling.DEFAULT
    kernel, vector = sampling.sample_kernel, 16 // BYTES[dtype]
    types = {"logits_ptr": f"*{dtype}", "uniforms_ptr": "*fp64", "tokens_ptr": "*i64", "valid_ptr": "*i1"}
    settings_types = {"c": "fp32", "top_k": "i32", "top_p": "fp32", "min_p": "fp32"}
    types |= {x: f"*{type_}" if of_rows else type_ for x, type_ in settings_types.items()}
    constants = {"HAS_TOP_K": HAS_TOP_K, "HAS_TOP_P": HAS_TOP_P, "GRANULE": 16 if dtype == "bf16" else 0}
    constants |= {"OF_ROWS": (of_rows,) * 4, "LANES": settings.lanes, "VECTOR": vector}
    constants["TILES_BLOCK"] = triton.next_power_of_2(-(-V // (settings.lanes * vector)))
    aligned = ("V", "logits_stride_b", "logits_stride_t")
    binary = compiled(kernel, target, types, constants, settings.num_warps, aligned)

    def report() -> SamplingReport:
        loops = [loop for loop in inner_loops(lines_of(binary, target, exits=2)) if count(LOAD, loop)]
        # The first finds the largest logit. The sum for top-p has no barrier either, but is shorter.
        searches = [len(loop) / count(LOAD, loop) for loop in loops[1:] if not count(BARRIER, loop)]
        threads = settings.num_warps * TARGETS[target].warp_size
        return SamplingReport(
            f"sample {name}",
            dtype,
            target,
            *registers_and_spills(binary, target),
            search=max(searches, default=0) * threads / (settings.lanes * vector),
            wide_loads=sum(count(WIDE_LOAD, loop) for loop in loops),
            narrow_loads=sum(count(LOAD, loop) - count(WIDE_LOAD, loop) for loop in loops),
        )

    return report


def sampling_reports() -> Iterator[Pending]:
    for target in TARGETS:
        for dtype in BYTES:
            yield sampling_report(dtype, target, "all", HAS_TOP_K=False, HAS_TOP_P=False)
            yield sampling_report(dtype, target, "top-k", HAS_TOP_K=True, HAS_TOP_P=False)
            yield sampling_report(dtype, target, "top-p", HAS_TOP_K=False, HAS_TOP_P=True)
            yield sampling_report(dtype, target, "top-k, top-p", HAS_TOP_K=True, HAS_TOP_P=True)
            yield sampling_report(dtype, target, "settings of rows", HAS_TOP_K=True, HAS_TOP_P=True, of_rows=True)


def predicted(report: Report, name: str) -> str:
    """Issue and special-function time of a program over the time of its bytes; below 1 it is bound by memory."""
    device = DEVICES[name]
    if report.target != device.target or not report.instructions:
        return ""
    bytes_a_pair = BYTES[report.dtype] * (3 if report.kernel.startswith("gradient") else 2)
    pairs = device.bandwidth * 1e3 / bytes_a_pair / (device.units * device.clock)  # per clock and unit
    return f"{report.program * pairs / device.lanes:.2f}, {report.special * pairs / device.special:.2f}"


def reports() -> Iterator[Pending]:
    for target in TARGETS:
        for dtype in BYTES:
            yield partial_report(dtype, target)
            yield from divergence_reports(dtype, target)
        yield decide_report(boundary.combine_kernel, "combine", target, {})
        yield decide_report(boundary.decide_kernel, "decide", target, {"COMBINE": True})
        yield decide_report(boundary.decide_kernel, "walk", target, {"COMBINE": False})


def finished(*stages: Iterator[Pending]) -> list[Any]:
    return [report() for report in list(itertools.chain(*stages))]


OF_PAIRS = """\
# Machine code of the Triton kernels, and the pace it predicts

{versions}, no GPU: `python -m benchmarks.static`.

Registers are those of a thread, and what is spilled is on NVIDIA bytes of stack. For one column of one position (a pair
of a student's and a teacher's logit): the instructions of a program, with what it executes before and after its loop,
those of the main loop alone, the longest in the machine code, and its special functions. Then how often one iteration
loads 128 bits, loads fewer, waits at a barrier or passes a value between lanes. The last columns are **predicted** from
the code and the makers' data sheets, not measured: the time to issue a program's instructions, then that of the special
functions, over the time of the bytes at nine tenths of the data sheet's bandwidth. Below 1, memory sets the pace.
"""

OF_SAMPLING = """
Sampling, one program a row of at most {V} logits, which it reads several times from cache: `search` are the
instructions of a logit in one of the passes that look for the least logit to keep, of which each filter needs about
four for bfloat16 and twelve for float32; the loads are those of all passes.
"""

OF_ATTENTION = """
Ragged attention, which drafts a token (T = 1) or scores a block (T = 16): shared memory, a tile's queries x slots, the
128-bit loads that a thread needs for a tile of keys and one of values, and the loads of the longest loop, which on
sm_100 may be more than the main loop's turn; copies go straight to shared memory while the tile before is worked on.
"""


def print_table(kind: type, rows: Iterator[Pending], devices: Iterable[str] = ()) -> None:
    names = [field.name for field in dataclasses.fields(kind)] + [f"{name} issue, special" for name in devices]
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join(["---"] * len(names)) + " |")
    for report in finished(rows):
        cells = [f"{x:.1f}" if isinstance(x, float) else str(x) for x in dataclasses.astuple(report)]
        print("| " + " | ".join(cells + [predicted(report, name) for name in devices]) + " |")


def main() -> None:
    if "--json" in sys.argv:
        found = finished(reports(), sampling_reports(), attention_reports())
        print(json.dumps([dataclasses.asdict(report) for report in found]))
        return
    versions = f"torch {torch.__version__.split('+')[0]}, triton {triton.__version__}, {datetime.date.today()}"
    print(OF_PAIRS.format(versions=versions))
    print_table(Report, reports(), DEVICES)
    print(OF_SAMPLING.format(V=V))
    print_table(SamplingReport, sampling_reports())
    print(OF_ATTENTION)
    print_table(AttentionReport, attention_reports())


if __name__ == "__main__":
    main()

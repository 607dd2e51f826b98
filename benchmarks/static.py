"""The machine code of the Triton kernels, inspected on a machine without a GPU.

    python -m benchmarks.static [--json]

Each kernel is compiled ahead of time for each target. Columns: registers per thread; bytes spilled; per column of one
position (a pair of a student's and a teacher's logit) the instructions of a program, with what it executes before and
after its loop, those of the main loop alone, the longest in the machine code, and its special functions; then how often
one iteration loads 128 bits, loads fewer, waits at a barrier or passes a value between lanes; then, *predicted* and not
measured, for each device the time to issue a program's instructions and that of the special functions, over the time of
the bytes. The kernels of ragged attention have their own table: shared memory, and how often the main loop loads 128
bits, directly into shared memory or not, and fewer. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from motab_kernels.gpu import attention, boundary, divergence

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "bf16": 2}
V = 151936

# The names of each kind of instruction: NVIDIA's SASS, then AMD's.
SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|sqrt|rsq)_")
WIDE_LOAD = re.compile(r"LDG(STS)?\.E(\.\w+)*\.128\b|(buffer|global)_load_dwordx4")
COPY = re.compile(r"LDGSTS")  # from global to shared memory, asynchronously
LOAD = re.compile(r"LDG(STS)?\.|(buffer|global)_load")
BARRIER = re.compile(r"BAR\.|s_barrier")
SHUFFLE = re.compile(r"SHFL|LDS|STS|REDUX|ds_\w+|v_permlane|_dpp")


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


def count(pattern: re.Pattern[str], lines: list[str]) -> int:
    return sum(1 for line in lines if pattern.search(line))


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


def compiled(
    kernel: Any,
    target: str,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    aligned: tuple[str, ...] = (),
    **options: int,
) -> Any:
    """Compile; arguments without a type are int32. Pointers and `aligned` integers are divisible by 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    by_16 = [i for i, name in enumerate(names) if name.endswith("_ptr") or name in aligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in by_16}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps, **options})


def lines_of(binary: Any, target: str) -> list[str]:
    """Instructions and labels, in order."""
    if target.startswith("gfx"):
        text = binary.asm["amdgcn"].split("s_endpgm")[0]
        lines = [re.sub(r"\s*;.*", "", line).strip() for line in text.splitlines()]
        return [line for line in lines if line and not re.match(r"\.(?!LBB)", line)]
    return [line.split("\t")[-1].strip() for line in binary.asm["sass"].splitlines()[1:] if line.strip()]


def branches(lines: list[str]) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions, and the places of branches and of their targets: labels, or addresses in NVIDIA's code, whose
    instructions have 16 bytes each."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        else:
            code.append(line)
    found = []
    for i, line in enumerate(code):
        branch = re.search(r"(?:BRA\S*|s_c?branch\S*)\s.*?(?:(\.?LBB\w+)|0x([0-9a-f]+))", line)
        if branch:
            found.append((i, labels.get(branch[1], i) if branch[1] else int(branch[2], 16) // 16))
    return code, found


def main_loop(lines: list[str]) -> list[str]:
    """The longest stretch between a backward branch and its target."""
    code, places = branches(lines)
    start, end = max(((target, i + 1) for i, target in places if target < i), key=length, default=(0, 0))
    return code[start:end]


def executed(lines: list[str], tiles: int) -> int:
    """Instructions of a program of whole tiles: what comes before the main loop, the loop, and what comes after it but
    for the tail, the longest stretch that a branch behind the loop skips. If none does, all of it is the tail."""
    code, places = branches(lines)
    start, end = max(((target, i + 1) for i, target in places if target < i), key=length)
    tail = max(((i + 1, target) for i, target in places if target > i >= end), key=length, default=(end, len(code)))
    rest = [line for line in code[end : tail[0]] + code[tail[1] :] if not line.startswith("NOP")]
    return start + tiles * (end - start) + len(rest)


def length(stretch: tuple[int, int]) -> int:
    return stretch[1] - stretch[0]


def registers_and_spills(binary: Any, target: str) -> tuple[int, int]:
    if target.startswith("gfx"):
        code = binary.asm["amdgcn"]
        found = [re.search(rf"\.{name}:\s+(\d+)", code) for name in ("vgpr_count", "vgpr_spill_count")]
    else:
        architecture = TARGETS[target].arch
        with tempfile.TemporaryDirectory() as folder:
            ptx = Path(folder, "kernel.ptx")
            ptx.write_text(binary.asm["ptx"])
            name = f"{target}a" if architecture >= 90 else target
            command = [get_ptxas(architecture).path, "-v", f"--gpu-name={name}", ptx, "-o", f"{ptx}.cubin"]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        found = [re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)]
    return tuple(int(match[1]) if match else 0 for match in found)  # type: ignore[return-value]


def loop_report(kernel: Any, name: str, dtype: str, target: str, settings: Any, constants: dict[str, Any]) -> Report:
    """A pass over the vocabulary, whose logits are `dtype` and contiguous, with a temperature."""
    vector = 16 // BYTES[dtype]
    of_logits = ("student_ptr", "teacher_ptr", "out_ptr")
    types = {n: f"*{dtype}" if n in of_logits else "*fp32" for n in kernel.arg_names if n.endswith("_ptr")}
    types |= {"token_ptr": "*i64", "keep_ptr": "*i1", "lam": "fp32", "rest": "fp32"}
    aligned = tuple(n for n in kernel.arg_names if re.match(r"(student|teacher|out)_stride_|V$", n))
    constants = constants | {
        "HAS_TEMPERATURE": True,
        "GROUPS": settings.per_lane // vector,
        "LANES": settings.lanes,
        "VECTOR": vector,
        "TILES": settings.tiles,
    }
    binary = compiled(kernel, target, types, constants, settings.num_warps, aligned)
    lines = lines_of(binary, target)
    loop = main_loop(lines)
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


def partial_report(dtype: str, target: str) -> Report:
    """The boundary's pass, with every output."""
    settings = boundary.HIP if target.startswith("gfx") else boundary.DEFAULT
    return loop_report(boundary.partial_kernel, "partial", dtype, target, settings, {})


def divergence_reports(dtype: str, target: str) -> Iterator[Report]:
    """Both forward passes and the gradient, for each kind that is compiled apart; "jsd leaning": beta is not 1/2."""
    settings = divergence.HIP if target.startswith("gfx") else divergence.DEFAULT
    for name in ("forward_kl", "reverse_kl", "normalisers"):
        constants = {"HAS_KEEP": True, "FORWARD": name == "forward_kl", "REVERSE": name == "reverse_kl"}
        yield loop_report(divergence.sums_kernel, f"sums {name}", dtype, target, settings, constants)
    for kind in ("jsd", "jsd leaning", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        constants = {"HAS_KEEP": True, "KIND": kind.split()[0], "EVEN": kind == "jsd", "FAST": target.startswith("sm")}
        yield loop_report(divergence.terms_kernel, f"terms {kind}", dtype, target, settings, constants)
    for kind in ("forward_kl", "reverse_kl", "jsd", "jsd leaning", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        constants = {"KIND": kind.split()[0], "EVEN": kind == "jsd", "FAST": target.startswith("sm")}
        yield loop_report(divergence.gradient_kernel, f"gradient {kind}", dtype, target, settings, constants)


def decide_report(kernel: Any, name: str, target: str, constants: dict[str, Any]) -> Report:
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
    return Report(name, "bf16", target, *registers_and_spills(binary, target))


def attention_report(
    dtype: str, target: str, D: int, GROUP: int, T: int, HAS_WINDOW: bool, softcap: bool, PAGE: int = 0
) -> AttentionReport:
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
    loop = main_loop(lines_of(binary, target))
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


def combine_report(target: str) -> AttentionReport:
    settings = attention.HIP if target.startswith("gfx") else attention.DEFAULT
    kernel = attention.combine_kernel
    types = {"partial_ptr": "*fp32", "lengths_ptr": "*i64", "sinks_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = {"HAS_SINKS": True, "GROUP": 4, "D": 128, "D_BLOCK": 128}
    constants |= {"SPLIT": settings.split, "S_BLOCK": settings.splits}
    binary = compiled(kernel, target, types, constants, settings.num_warps)
    return AttentionReport(
        "combine D=128", "bf16", target, *registers_and_spills(binary, target), binary.metadata.shared
    )


def attention_reports() -> Iterator[AttentionReport]:
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


def predicted(report: Report, name: str) -> str:
    """Issue and special-function time of a program over the time of its bytes; below 1 it is bound by memory."""
    device = DEVICES[name]
    if report.target != device.target or not report.instructions:
        return ""
    bytes_a_pair = BYTES[report.dtype] * (3 if report.kernel.startswith("gradient") else 2)
    pairs = device.bandwidth * 1e3 / bytes_a_pair / (device.units * device.clock)  # per clock and unit
    return f"{report.program * pairs / device.lanes:.2f}, {report.special * pairs / device.special:.2f}"


def reports() -> Iterator[Report]:
    for target in TARGETS:
        for dtype in BYTES:
            yield partial_report(dtype, target)
            yield from divergence_reports(dtype, target)
        yield decide_report(boundary.combine_kernel, "combine", target, {})
        yield decide_report(boundary.decide_kernel, "decide", target, {"COMBINE": True})
        yield decide_report(boundary.decide_kernel, "walk", target, {"COMBINE": False})


def print_table(kind: type, rows: Iterator[Any], devices: Iterable[str] = ()) -> None:
    names = [field.name for field in dataclasses.fields(kind)] + [f"{name} issue, special" for name in devices]
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join(["---"] * len(names)) + " |")
    for report in rows:
        cells = [f"{x:.1f}" if isinstance(x, float) else str(x) for x in dataclasses.astuple(report)]
        print("| " + " | ".join(cells + [predicted(report, name) for name in devices]) + " |", flush=True)


def main() -> None:
    if "--json" in sys.argv:
        print(json.dumps([dataclasses.asdict(report) for report in (*reports(), *attention_reports())]))
        return
    print_table(Report, reports(), DEVICES)
    print()
    print_table(AttentionReport, attention_reports())


if __name__ == "__main__":
    main()

"""What the compilers make of our Triton kernels, on a machine without a GPU.

    python -m benchmarks.static [--json]

Each kernel is compiled ahead of time for each target. Columns: registers a thread; bytes spilled; and of the
main loop, the longest in the machine code, per column of one position (a pair of a student's and a teacher's
logit): instructions, special-function instructions; then how often, in one turn, it loads 128 bits, loads
fewer, waits at a barrier or passes a value between lanes. To be run without TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from motab_kernels.gpu import boundary

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "bf16": 2}
V = 151936

# What each kind of instruction is called: NVIDIA's SASS, then AMD's.
SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|sqrt|rsq)_")
WIDE_LOAD = re.compile(r"LDG\.E(\.\w+)*\.128|(buffer|global)_load_dwordx4")
LOAD = re.compile(r"LDG|(buffer|global)_load")
BARRIER = re.compile(r"BAR\.|s_barrier")
SHUFFLE = re.compile(r"SHFL|LDS|STS|REDUX|ds_\w+|v_permlane|_dpp")


@dataclasses.dataclass(frozen=True)
class Report:
    """One kernel on one target; the loop's figures are 0 where a kernel has no loop over the vocabulary."""

    kernel: str
    dtype: str
    target: str
    registers: int
    spilled: int
    instructions: float = 0.0
    special: float = 0.0
    wide_loads: int = 0
    narrow_loads: int = 0
    barriers: int = 0
    shuffles: int = 0


def compiled(
    kernel: Any,
    target: str,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    aligned: tuple[str, ...] = (),
) -> Any:
    """Compile; arguments without a type are int32. Pointers and `aligned` integers are divisible by 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    by_16 = [i for i, name in enumerate(names) if name.endswith("_ptr") or name in aligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in by_16}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps})


def lines_of(binary: Any, target: str) -> list[str]:
    """Instructions and labels, in order."""
    if target.startswith("gfx"):
        text = binary.asm["amdgcn"].split("s_endpgm")[0]
        lines = [re.sub(r"\s*;.*", "", line).strip() for line in text.splitlines()]
        return [line for line in lines if line and not re.match(r"\.(?!LBB)", line)]
    return [line.split("\t")[-1].strip() for line in binary.asm["sass"].splitlines()[1:] if line.strip()]


def main_loop(lines: list[str]) -> list[str]:
    """The longest stretch between a label and a branch back to it."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loop: list[str] = []
    for i, line in enumerate(lines):
        branch = re.search(r"(?:BRA\S*|s_c?branch\S*)\s.*?(\.?LBB\w+)", line)
        start = labels.get(branch[1], i) if branch else i
        if i - start > len(loop):
            loop = [line for line in lines[start : i + 1] if not line.endswith(":")]
    return loop


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


def partial_report(dtype: str, target: str) -> Report:
    """The pass over the vocabulary: every output, with a temperature."""
    settings = boundary.DEFAULT
    if target.startswith("gfx"):
        settings = boundary.SETTINGS["hip"]
    vector = 16 // BYTES[dtype]
    types = {"student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}", "token_ptr": "*i64"}
    types |= {"temperature_ptr": "*fp32", "partial_ptr": "*fp32"}
    aligned = ("student_stride_b", "student_stride_t", "teacher_stride_b", "teacher_stride_t", "V")
    constants = {
        "HAS_TEMPERATURE": True,
        "GROUPS": settings.per_lane // vector,
        "LANES": settings.lanes,
        "VECTOR": vector,
        "TILES": settings.tiles,
    }
    binary = compiled(boundary.partial_kernel, target, types, constants, settings.num_warps, aligned)
    loop = main_loop(lines_of(binary, target))
    threads = settings.num_warps * TARGETS[target].warp_size
    pairs = settings.lanes * settings.per_lane / threads

    def count(pattern: re.Pattern[str]) -> int:
        return sum(1 for line in loop if pattern.search(line))

    return Report(
        "partial",
        dtype,
        target,
        *registers_and_spills(binary, target),
        instructions=len(loop) / pairs,
        special=count(SPECIAL) / pairs,
        wide_loads=count(WIDE_LOAD),
        narrow_loads=count(LOAD) - count(WIDE_LOAD),
        barriers=count(BARRIER),
        shuffles=count(SHUFFLE),
    )


def decide_report(target: str) -> Report:
    """The walk, with all there is to decide by; its logits are a token's alone."""
    settings = boundary.DEFAULT
    S_BLOCK = triton.next_power_of_2(boundary.workspace_shape(1, V, settings)[2])
    doubles = ("scale_ptr", "theta_ptr", "scores_ptr", "history_ptr")
    pointers = [name for name in boundary.decide_kernel.arg_names if name.endswith("_ptr")]
    types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(doubles, "*fp64")
    types |= {"student_ptr": "*bf16", "teacher_ptr": "*bf16", "token_ptr": "*i64", "argmax_ptr": "*i64"}
    types |= {"counters_ptr": "*i32", "rank_ptr": "*i32", "ends_ptr": "*i1", "stray_ptr": "*i1"}
    constants = {
        "SCORE": "value_ratio",
        "HAS_TEMPERATURE": True,
        "HAS_ENDS": True,
        "HAS_THETA": True,
        "HAS_DOUBT": True,
        "WINDOW": 8,
        "WINDOW_BLOCK": 8,
        "SPLIT": settings.lanes * settings.per_lane * settings.tiles,
        "S_BLOCK": S_BLOCK,
        "T_BLOCK": max(1, settings.sums // S_BLOCK),
    }
    binary = compiled(boundary.decide_kernel, target, types, constants, num_warps=1)
    return Report("decide", "bf16", target, *registers_and_spills(binary, target))


def reports() -> Iterator[Report]:
    for target in TARGETS:
        for dtype in BYTES:
            yield partial_report(dtype, target)
        yield decide_report(target)


def main() -> None:
    if "--json" in sys.argv:
        print(json.dumps([dataclasses.asdict(report) for report in reports()]))
        return
    names = [field.name for field in dataclasses.fields(Report)]
    print(" ".join(f"{name:>12}" for name in names))
    for report in reports():
        cells = dataclasses.astuple(report)
        print(" ".join(f"{x:12.2f}" if isinstance(x, float) else f"{x:>12}" for x in cells), flush=True)


if __name__ == "__main__":
    main()

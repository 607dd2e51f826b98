"""Kernels compiled ahead of time for each target, and what is found in their machine code."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# The names of each kind of instruction: NVIDIA's SASS, then AMD's.
SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|sqrt|rsq)_")
WIDE_LOAD = re.compile(r"LDG(STS)?\.E(\.\w+)*\.128\b|(buffer|global)_load_dwordx4")
INSTRUCTION = 16  # bytes, of NVIDIA's
COPY = re.compile(r"LDGSTS")  # from global to shared memory, asynchronously
LOAD = re.compile(r"LDG(STS)?\.|(buffer|global)_load")
BARRIER = re.compile(r"BAR\.|s_barrier")
SHUFFLE = re.compile(r"SHFL|LDS|STS|REDUX|ds_\w+|v_permlane|_dpp")

#: By target what was compiled for NVIDIA's and not read since: it is disassembled together.
UNREAD: defaultdict[str, list[Any]] = defaultdict(list)


def count(pattern: re.Pattern[str], lines: list[str]) -> int:
    return sum(1 for line in lines if pattern.search(line))


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
    binary = triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps, **options})
    UNREAD[target].append(binary)
    return binary


def lines_of(binary: Any, target: str, exits: int = 1) -> list[str]:
    """Instructions, in order; of AMD's code labels too, up to this exit, behind which lies what is seldom executed."""
    if target.startswith("gfx"):
        text = "".join(binary.asm["amdgcn"].split("s_endpgm")[:exits])
        lines = [re.sub(r"\s*;.*", "", line).strip() for line in text.splitlines()]
        return [line for line in lines if line and not re.match(r"\.(?!LBB)", line)]
    if "lines" not in binary.asm:
        disassemble(UNREAD.pop(target), target)
    return binary.asm["lines"]


def disassemble(binaries: list[Any], target: str) -> None:
    """All at once, one behind the other, since nvdisasm takes 0.3 s to start."""
    codes = [code_of(binary.asm["cubin"]) for binary in binaries]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code")
        path.write_bytes(b"".join(codes))
        name = f"SM{TARGETS[target].arch}{'a' if TARGETS[target].arch >= 90 else ''}"
        command = [triton.knobs.nvidia.nvdisasm.path, "--binary", name, path]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = iter(re.findall(r"/\*[0-9a-f]+\*/\s+(.*?)\s*;", said))
    start = 0
    for binary, code in zip(binaries, codes, strict=True):
        own = itertools.islice(lines, len(code) // INSTRUCTION)
        binary.asm["lines"] = [moved(line, -start) for line in own]
        start += len(code)


def moved(line: str, by: int) -> str:
    """With the target of a branch elsewhere."""
    return re.sub(r"(?<=\b0x)\w+$", lambda to: f"{int(to[0], 16) + by:x}", line) if "BRA" in line else line


def code_of(cubin: bytes) -> bytes:
    """Of its one kernel: the section .text.NAME of the ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    (code,) = (
        cubin[start : start + length]
        for name, *_, start, length in sections
        if cubin.startswith(b".text.", sections[names][4] + name)
    )
    return code


def branches(lines: list[str]) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions, and the places of branches and of their targets: labels, or addresses in NVIDIA's code, whose
    instructions have one size."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        else:
            code.append(line)
    found = []
    for i, line in enumerate(code):
        branch = re.search(r"(?:BRA\S*|s_c?branch\S*)\s.*?(?:(\.LBB\w+)|0x([0-9a-f]+))", line)
        if branch:
            found.append((i, labels.get(branch[1], i) if branch[1] else int(branch[2], 16) // INSTRUCTION))
    return code, found


def loops(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where they begin and end, in order: at the target of a backward branch, and behind it."""
    return sorted({(target, i + 1) for i, target in places if target < i})


def inner_loops(lines: list[str]) -> list[list[str]]:
    """Loops that hold no other, in order."""
    code, places = branches(lines)
    found = loops(places)
    inner = [x for x in found if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in found)]
    return [code[start:end] for start, end in inner]


def main_loop(code: list[str], places: list[tuple[int, int]]) -> tuple[int, int]:
    """The first of the loops with the most 128-bit loads: others fill with zeros, or sum up again."""
    return max(loops(places), key=lambda loop: count(WIDE_LOAD, code[slice(*loop)]), default=(0, 0))


def body(lines: list[str]) -> list[str]:
    """The main loop's."""
    code, places = branches(lines)
    return code[slice(*main_loop(code, places))]


def executed(lines: list[str], tiles: int) -> int:
    """Instructions of a program of whole tiles: what comes before the main loop, the loop, and the shortest way from it
    to the end, which leaves out the tail and what is seldom needed."""
    code, places = branches(lines)
    start, end = main_loop(code, places)
    targets = dict(places)
    way = [0] * (len(code) + 1)  # from each place to the end
    for i in reversed(range(end, len(code))):
        ways = [] if re.match(r"(BRA\S*|s_branch)\s+(0x|\.LBB)", code[i]) else [way[i + 1]]
        if targets.get(i, 0) > i:
            ways.append(way[targets[i]])
        way[i] = 1 if re.search("EXIT|s_endpgm", code[i]) else 1 + min(ways, default=len(code))
    return start + tiles * (end - start) + way[end]


def registers_and_spills(binary: Any, target: str) -> tuple[int, int]:
    """Spilled: AMD's registers, or bytes of NVIDIA's stack, on which our kernels have nothing else."""
    if target.startswith("gfx"):
        said, names = binary.asm["amdgcn"], (r"\.vgpr_count:\s+", r"\.vgpr_spill_count:\s+")
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(binary.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        names = "REG:", "STACK:"
    registers, spilled = (int(re.findall(name + r"(\d+)", said)[0]) for name in names)
    return registers, spilled

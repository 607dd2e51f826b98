"""The C++ kernels compiled for aarch64, by Zig's clang++, on any machine.

    pip install ziglang && python tests/motab_kernels/cross_compile.py

They are not run. The loops over the vocabulary have to be NEON's fused multiply-adds, four lanes each.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[2] / "motab_kernels" / "cpu").glob("*.cpp"))
FLAGS = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-Wno-unused-command-line-argument",
]
COMPILER = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu", *FLAGS]
VECTORISED = {"attention.cpp", "boundary.cpp", "divergence.cpp", "functions.cpp", "sampling.cpp"}

with tempfile.TemporaryDirectory() as folder:
    for source in SOURCES:
        assembly = Path(folder) / f"{source.stem}.s"
        subprocess.run([*COMPILER, "-S", str(source), "-o", str(assembly)], check=True)
        count = len(re.findall(r"\bfml[as]\s+v\d+\.4s", assembly.read_text(errors="replace")))
        print(f"{source.name}: {count} fused multiply-adds of four lanes")
        assert (count > 0) == (source.name in VECTORISED)
    subprocess.run([*COMPILER, "-shared", *map(str, SOURCES), "-o", f"{folder}/kernels.so"], check=True)

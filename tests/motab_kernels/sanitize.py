"""The tests of the C++ kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

    python tests/motab_kernels/sanitize.py

Builds the kernels once for each, and runs pytest in a process of its own with the sanitizer's runtime in front. For
ThreadSanitizer they are built without OpenMP, whose runtime it cannot see into: on threads of the standard library.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parents[1] / "motab_kernels" / "cpu").glob("*.cpp"))
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-g", "-O1", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared"]
SANITIZERS = {
    "asan": ["-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-pthread", "-fsanitize=thread"],
}
# A fork's child has one thread and no sanitizer; another starts processes that load the library as it was installed;
# a preloaded AddressSanitizer does not know the exceptions that torch itself throws.
TESTS = [
    *(str(HERE / f"test_{name}.py") for name in ("cpu", "attention", "kv_cache", "sampling")),
    "-k",
    "not forked and not missing and not gpu and not autograd_has_saved and not triton and not torch and not compiled"
    " and not as_transformers",  # thousands of draws of each row
]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in SANITIZERS.items():
            library = f"{folder}/{name}.so"
            subprocess.run([COMPILER, *FLAGS, *flags, *map(str, SOURCES), "-o", library], check=True)
            found = [COMPILER, f"-print-file-name=lib{name}.so"]
            runtime = subprocess.run(found, check=True, capture_output=True, text=True).stdout.strip()
            environment = {
                **os.environ,
                "LD_PRELOAD": runtime,
                "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
                "TSAN_OPTIONS": "halt_on_error=1",
            }
            print(name, flush=True)
            code = subprocess.run([sys.executable, __file__, library], env=environment).returncode
            if code:
                return code
    return 0


def run_tests(library: str) -> int:
    import pytest

    from motab_kernels.cpu import library as loader

    assert loader.HAS_LIBRARY, "the tests skip themselves where the kernels are not installed"
    loader.LIBRARY = ctypes.CDLL(library)
    # Uncaptured, for a sanitizer ends the process with its report.
    return pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", *TESTS])


if __name__ == "__main__":
    sys.exit(run_tests(sys.argv[1]) if len(sys.argv) > 1 else main())

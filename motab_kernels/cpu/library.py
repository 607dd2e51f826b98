"""The shared object of the C++ kernels, called through ctypes on the data pointers of tensors."""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path

import torch  # noqa: F401  loads the OpenMP runtime whose threads the kernels share


def _load() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # built for another machine, or without its OpenMP runtime
                return None
    return None


LIBRARY = _load()
HAS_LIBRARY = LIBRARY is not None
HINT = "install a C++ compiler (g++ or clang++ with OpenMP) and reinstall motab"


def kernels() -> ctypes.CDLL:
    if LIBRARY is None:
        raise ValueError(f'backend: "cpu" expected the C++ kernels, which are not built: {HINT}, or use "torch"')
    return LIBRARY

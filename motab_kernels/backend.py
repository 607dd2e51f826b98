"""Decides which implementation of an op runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from motab_kernels.cpu.library import HAS_LIBRARY, HINT, kernels
from motab_kernels.tensors import KERNEL_DTYPES

#: The backends, and where their kernels are.
FOLDERS = {"torch": "reference", "cpu": "cpu", "triton": "gpu"}
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(backend: str | None, *logits: Tensor) -> str:
    """The backend that was asked for; None: the kernels of the device where they can run, else "torch"."""
    return _choose(backend, logits[0].device, *(x.dtype for x in logits))


def choose_for_storages(backend: str | None, storages: list[Tensor]) -> str:
    """The same for tensors that are moved as bytes, of any dtype; the kernels need their last dimension contiguous."""
    contiguous = all(x.stride(-1) == 1 for x in storages)
    if backend is None and not contiguous:
        return "torch"
    backend = _choose(backend, storages[0].device)
    if backend != "torch" and not contiguous:
        raise ValueError(f'backend: "{backend}" expected keys and values contiguous along D, got a stride; use "torch"')
    return backend


def _choose(backend: str | None, device: torch.device, *dtypes: torch.dtype) -> str:
    check_backend(backend)
    kernels_take = all(dtype in KERNEL_DTYPES for dtype in dtypes)
    if backend is None:
        if kernels_take and device.type == "cuda" and HAS_TRITON:
            return "triton"
        if kernels_take and device.type == "cpu":
            if HAS_LIBRARY:
                return "cpu"
            if not torch.compiler.is_compiling():
                warn_once()
        return "torch"
    if backend == "triton":
        check_triton()
    if backend == "cpu":
        kernels()
        if device.type != "cpu":
            raise ValueError(f'backend: "cpu" expected tensors on the CPU, got {device}; use "triton" or "torch"')
    if backend != "torch" and not kernels_take:
        got = ", ".join(str(dtype) for dtype in dtypes)
        kinds = "float32, bfloat16 or float16"
        raise ValueError(f'backend: "{backend}" expected {kinds} logits, got {got}; use "torch"')
    return backend


@functools.cache
def warn_once() -> None:
    """Warn, at the first call that would use them, that the C++ kernels are missing, and say how to get them."""
    warnings.warn(f"motab_kernels runs in PyTorch on this CPU, without its C++ kernels: {HINT}", stacklevel=5)


_imported = functools.cache(importlib.import_module)


def implementation(op: str, backend: str, device: torch.device | None = None) -> Any:
    """The module that runs an op on tensors of `device`, imported by the first call that needs it."""
    if backend == "triton":
        check_triton()
        if device is not None and device.type != "cuda" and not _imported("motab_kernels.gpu").INTERPRETED:
            raise ValueError(
                f'backend: "triton" expected tensors on a GPU, got {device}; use "torch", or set '
                "TRITON_INTERPRET=1 before triton is imported"
            )
    return _imported(f"motab_kernels.{FOLDERS[backend]}.{op}")


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in FOLDERS:
        raise ValueError(f"backend: expected one of {', '.join(FOLDERS)} or None, got {backend!r}")


def check_triton() -> None:
    if not HAS_TRITON:
        raise ValueError('backend: "triton" expected Triton to be installed; install it or use "torch"')

"""Triton kernels, one file an op."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


@triton.jit
def _probe():
    pass


#: Whether the kernels run in the interpreter, on CPU tensors: TRITON_INTERPRET=1 was set when triton was imported.
INTERPRETED = not isinstance(_probe, triton.JITFunction)
#: Whether they are compiled for NVIDIA.
NVIDIA = not INTERPRETED and torch.version.hip is None


def launched_on(device: torch.device) -> AbstractContextManager[None]:
    """A context in which kernels are launched on the device, even if another one is current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def row_stride(parameter: Tensor | float | None) -> int:
    """The stride of a parameter by rows; 0 if all rows share it."""
    return parameter.stride(0) if isinstance(parameter, Tensor) and parameter.dim() else 0


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], **options: int) -> None:
    """`kernel[grid](**arguments, **options)`, where arguments may hold more than the kernel has. By position, because
    Triton takes a third longer to bind keywords."""
    kernel[grid](*map(arguments.__getitem__, kernel.arg_names), **options)

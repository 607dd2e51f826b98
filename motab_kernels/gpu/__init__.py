"""Triton kernels, one file an op."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton


@triton.jit
def _probe():
    pass


#: Whether the kernels run in the interpreter, on CPU tensors: TRITON_INTERPRET=1 was set when triton was imported.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


def launched_on(device: torch.device) -> AbstractContextManager[None]:
    """A context in which kernels are launched on the device, even if another one is current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

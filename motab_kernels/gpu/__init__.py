"""Triton kernels, one file an op."""

import triton


@triton.jit
def _probe():
    pass


#: The kernels take CPU tensors: TRITON_INTERPRET=1 was set when triton was imported.
INTERPRETED = not isinstance(_probe, triton.JITFunction)

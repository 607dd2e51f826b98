"""What the tests of kernels share."""

import importlib.util

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def round_as_a_gpu_does(monkeypatch):
    """The interpreter rounds a multiply-add twice, a GPU once: in float64 the product is exact. And it cuts float32 to
    bfloat16, which a GPU rounds."""
    if importlib.util.find_spec("triton") is None:
        return
    from motab_kernels.gpu import INTERPRETED

    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        with np.errstate(all="ignore"):
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
    truncate = InterpreterBuilder.create_fp_trunc

    def fp_trunc(self, source, target_type):
        if (source.dtype.scalar, target_type.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, source, target_type)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", fp_trunc)

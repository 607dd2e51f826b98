"""What the tests of kernels share."""

import importlib.util

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def fused_multiply_add(monkeypatch):
    """The interpreter rounds a multiply-add twice, a GPU once; in float64 the product is exact."""
    if importlib.util.find_spec("triton") is None:
        return
    from motab_kernels.gpu import INTERPRETED

    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        with np.errstate(all="ignore"):
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)

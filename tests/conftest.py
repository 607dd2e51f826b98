"""Without a GPU, Triton kernels run in Triton's interpreter, which is asked for before triton is imported; or, with
MOTAB_PTX=80, as they are compiled for such a GPU, see `ptx`. With MOTAB_MOCK_GPU=1 the tests that need a GPU have one
in name, see `mock_gpu`, if there is a compiler to make it with."""

import gc
import importlib
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from sanitizer import Sanitizer

if "MOTAB_PTX" in os.environ:
    from ptx import driver

    import motab_kernels.gpu

    driver.install(int(os.environ["MOTAB_PTX"]))
    motab_kernels.gpu.INTERPRETED = True  # so that they take tensors on the CPU
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "MOTAB_MOCK_GPU" in os.environ and shutil.which("g++"):
    import mock_gpu

    mock_gpu.install()

from motab_kernels.backend import HAS_LIBRARY, HAS_TRITON, warn_once

if not HAS_LIBRARY:  # warned of once a process: here, where no test fails of it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warn_once()


def in_the_interpreter():
    return HAS_TRITON and "MOTAB_PTX" not in os.environ and importlib.import_module("motab_kernels.gpu").INTERPRETED


def round_as_a_gpu_rounds(monkeypatch):
    """The interpreter rounds a multiply-add twice, a GPU once: in float64 the product is exact. It cuts float32 to
    bfloat16, which a GPU rounds. And it multiplies matrices of bfloat16 as if their bits were whole numbers."""
    if not in_the_interpreter():
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # Triton 3.6 makes a bound of an array with one element, which NumPy 2.5 refuses
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)

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
    multiply = InterpreterBuilder.create_dot

    def dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        numbers = torch.from_numpy(x.data.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
        return TensorHandle(numbers.float().numpy(), tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture(autouse=True, scope="module")
def what_is_there_stays():
    """Modules and what they hold: else each of the many collections walks through all of it, half a second long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def triton_is_patched_once_a_launch(monkeypatch):
    """The interpreter puts its own functions in triton.language, and again for each function that a kernel calls, which
    took almost half of its time."""
    if not in_the_interpreter():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patched(function):
        used = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        is_patched = not any(tl.core.is_builtin(x.load) for x in used)
        return interpreter._LangPatchScope() if is_patched else patch(function)

    monkeypatch.setattr(interpreter, "_patch_lang", patched)


@pytest.fixture(autouse=True)
def round_as_a_gpu_does(monkeypatch):
    round_as_a_gpu_rounds(monkeypatch)


@pytest.fixture(autouse=True)
def kernels_stay_within_their_tensors(monkeypatch):
    """In the interpreter, which reads past a tensor's end in silence, each address is looked up, as `ptx` does."""
    if "MOTAB_MOCK_GPU" in os.environ:  # the same kernels
        return
    if in_the_interpreter():
        lookup = Sanitizer()
        lookup.patch(monkeypatch)
    elif "MOTAB_PTX" in os.environ:
        lookup = driver.Driver
    else:
        return
    from motab_kernels.gpu import kv_cache

    realign_ = kv_cache.realign_

    def realigned(storages, *args, **keywords):
        with monkeypatch.context() as patch:
            patch.setattr(lookup, "tensors", storages)  # the kernel has their addresses in a table
            realign_(storages, *args, **keywords)

    monkeypatch.setattr(kv_cache, "realign_", realigned)


@pytest.fixture
def fresh_memory_is_filled():
    """With NaN or the largest integer, so that what is read without being written, or not written, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def seed():
    """A fresh one, printed where a test fails."""
    value = torch.seed() % 2**31
    print(f"seed {value}")
    return value

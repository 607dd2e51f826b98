"""torch.cuda with one device, as far as the tests ask."""

import contextlib
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.cpp_extension import include_paths, library_paths

from mock_gpu.tensor import Device, MockMode, MockTensor, unwrapped

MEMORY = 8 << 30  # of which all is free: tests that need more are skipped
PROPERTIES = {"name": "mock", "major": 8, "minor": 0, "multi_processor_count": 108, "L2_cache_size": 1 << 10}


class DeviceContext(contextlib.nullcontext):
    """torch.cuda.device(...), of which there is one."""


class Stream:
    """Everything is done at once."""

    cuda_stream = device_index = 0

    def wait_stream(self, other):
        pass

    def synchronize(self):
        torch.cuda.synchronize()


class Event:
    """Nothing takes any time: a tenth of a millisecond."""

    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def elapsed_time(self, end):
        return 0.1


class CUDAGraph:
    def replay(self):
        for func, args, kwargs, result in self.captured:
            with _disable_current_modes(), np.errstate(all="ignore"):
                again = func(*args, **kwargs)
                for old, new in zip(tree_iter(result), tree_iter(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def graph(captured):
    captured.captured = Device.captured = []
    try:
        yield
    finally:
        Device.captured = None


def launch(call):
    """Kernels get the numbers; one that gets those of the host is refused, as Triton refuses it."""

    def launched(executor, *args, **kwargs):
        of_host = [x for x in tree_iter((args, kwargs)) if type(x) is torch.Tensor]
        if of_host:
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        args, kwargs = unwrapped((args, kwargs))
        with _disable_current_modes(), np.errstate(all="ignore"):
            call(executor, *args, **kwargs)
        if Device.captured is not None:
            Device.captured.append((lambda *x, **y: call(executor, *x, **y), args, kwargs, None))

    return launched


def answer(value):
    return lambda *args, **kwargs: value


CUDA = {
    "CUDAGraph": CUDAGraph,
    "Event": Event,
    "Stream": Stream,
    "_lazy_init": answer(None),
    "current_device": answer(0),
    "current_stream": answer(Stream()),
    "device": DeviceContext,
    "device_count": answer(1),
    "empty_cache": answer(None),
    "get_device_capability": answer((8, 0)),
    "get_device_name": answer("mock"),
    "get_device_properties": answer(SimpleNamespace(**PROPERTIES)),
    "get_rng_state": answer(torch.zeros(1)),
    "graph": graph,
    "is_available": answer(True),
    "is_bf16_supported": answer(True),
    "is_current_stream_capturing": lambda: Device.captured is not None,
    "mem_get_info": answer((MEMORY, MEMORY)),
    "max_memory_allocated": answer(0),
    "memory_allocated": answer(0),
    "memory_reserved": answer(0),
    "reset_peak_memory_stats": answer(None),
    "set_device": answer(None),
    "set_sync_debug_mode": lambda mode: setattr(Device, "sync_mode", mode),
    "stream": contextlib.nullcontext,
    "synchronize": answer(None),
}


def install():
    """From here on there is a GPU; nothing takes it back in this process."""
    from triton.runtime.interpreter import GridExecutor, InterpreterOptions, interpreter_builder

    from motab_kernels import tensors

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "device.so")
        source = Path(__file__).with_name("device.cpp")
        flags = ["-std=c++20", "-shared", "-fPIC", "-o", library]
        paths = [*(f"-I{x}" for x in include_paths()), *(f"-L{x}" for x in library_paths())]
        subprocess.run(["g++", source, *flags, *paths, "-lc10", "-ltorch_cpu"], check=True)
        torch.ops.load_library(library)
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.pin_memory = lambda self: self
    GridExecutor.__call__ = launch(GridExecutor.__call__)
    interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)  # a fifth of its time
    torch.__future__.set_swap_module_params_on_conversion(True)  # else a model's parameters stay plain tensors
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(...) is made on the host first
    torch.autograd.set_multithreading_enabled(False)  # else a thread of the device works on its gradients
    MockMode().__enter__()
    tensors._PLAIN |= {MockTensor}  # the ops need not know of either
    tensors.is_in_torch_dispatch_mode = answer(False)

"""A driver for Triton whose device is `ptx.machine`: tensors are the CPU's, code is that for an NVIDIA GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from ptx.machine import Machine
from ptx.memory import GlobalMemory
from ptx.text import Kernel, read


class Launcher:
    def __init__(self, source: Any, metadata: Any):
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, ptx: str, *rest: Any) -> None:
        arguments = rest[4:]  # after what hooks are told
        types = self.source.signature.values()
        kept = [(type_, value) for type_, value in zip(types, arguments, strict=True) if type_ != "constexpr"]
        tensors = [value for _, value in kept if isinstance(value, torch.Tensor)]
        kernel = _kernel(ptx)
        # Triton's own last parameters are scratch memory, of which our kernels take none.
        values = dict(zip(kernel.parameters, (_bits(*pair) for pair in kept), strict=False))
        memory = GlobalMemory([*tensors, *Driver.tensors])
        machine = Machine(kernel, memory, values, (x, y, z), 32 * self.metadata.num_warps, self.metadata.shared)
        machine.run(seed=Driver.launches)
        Driver.launches += 1
        if Driver.record is not None:
            Driver.record.append(machine)


@functools.lru_cache(maxsize=256)
def _kernel(ptx: str) -> Kernel:
    return read(ptx)


def _bits(type_: str, value: Any) -> np.ndarray:
    """An argument as a parameter holds it."""
    if isinstance(value, torch.Tensor):
        value, type_ = value.data_ptr(), "u64"
    kinds = {"i1": "u1", "fp32": "f4", "fp64": "f8"}
    return np.full((1, 1), value, kinds.get(type_) or f"{type_[0]}{int(type_[1:]) // 8}")


class Utilities:
    """What Triton asks of a device: one with room for anything that the target has."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 << 10, "multiprocessor_count": 108, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, name, 0, 0, 1024


class Driver:
    """To be made Triton's by `triton.runtime.driver.set_active`."""

    launches = 0
    record: list[Machine] | None = None  # if a list, launches that are through are kept in it
    tensors: Sequence[torch.Tensor] = ()  # that kernels may touch beside their arguments
    utils = Utilities()
    launcher_cls = Launcher

    def __init__(self, architecture: int = 80):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install(architecture: int) -> None:
    """Have Triton compile for this device from now on, and run there. Its assembler is not asked: PTX is what runs."""
    begin = CompiledKernel._init_handles

    def with_code(kernel: CompiledKernel) -> None:
        begin(kernel)
        kernel.function = kernel.asm["ptx"]

    CompiledKernel._init_handles = with_code
    CUDABackend.make_cubin = lambda *arguments: b""
    # Apart from where whole code is kept.
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir, "ptx"))
    driver.set_active(Driver(architecture))

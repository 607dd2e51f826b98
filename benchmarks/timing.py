"""How long a call takes and how much memory it takes, on a GPU or the CPU."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Call = Callable[[], object]
CALLS_IN_A_GRAPH = 20  # at least: the launch of a graph itself takes some microseconds
SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def gpu_is_lost() -> bool:
    """Whether an error, as of an address outside of all tensors, has left a GPU from which only errors come."""
    try:
        synchronise("cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        return True
    return False


def settle(device: str) -> None:
    """Touch memory and free it: otherwise the first provider would pay for memory that is new to a virtual machine."""
    if device != "cuda":
        torch.empty(2 << 30, dtype=torch.uint8).fill_(1)


def rotations(bytes_a_call: int, device: str) -> int:
    """How many sets of inputs fill three times the last cache, so that no call finds its inputs there."""
    return min(256, max(1, -(-3 * last_cache(device) // bytes_a_call)))


def last_cache(device: str) -> int:
    """Bytes of a GPU's second-level cache, or a CPU's third-level one (Linux; 32 MiB if unknown)."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(path.read_text().strip().removesuffix("K")) << 10 if path.exists() else 32 << 20


def rounds(seconds: float) -> int:
    """How often to time a call of this length: 5 times, or fewer so that all take about 6 s, but at least once."""
    return max(1, min(5, round(6 / seconds)))


def median_ms(calls: Sequence[Call], device: str, seconds: float = 0.4) -> float:
    """The median time of a call, including the launch where the host takes longer. The calls are made in turn."""
    for i in range(2):
        calls[i % len(calls)]()
    synchronise(device)
    start = time.perf_counter()
    calls[0]()
    synchronise(device)
    rounds = min(200, max(5, int(seconds / (time.perf_counter() - start))))
    if device != "cuda":
        times = []
        for i in range(rounds):
            start = time.perf_counter()
            calls[i % len(calls)]()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for i, (begin, end) in enumerate(events):
        begin.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def replayed_ms(calls: list[Call]) -> float:
    """The time of one call in replays of a CUDA graph of all calls: the GPU's time, without waits for the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    repeats = -(-CALLS_IN_A_GRAPH // len(calls))
    with torch.cuda.graph(graph):
        for call in calls * repeats:
            call()
    return median_ms([graph.replay], "cuda") / (len(calls) * repeats)


def peak_mib(call: Call, device: str) -> float:
    """The peak of memory during a call beyond the memory held before: on a GPU the allocator's, on a CPU (Linux) the
    process's."""
    if device != "cuda":
        # Return free memory to the system first, and reset the peak.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_kib("VmRSS")
        call()
        return (resident_kib("VmHWM") - before) / 2**10
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def resident_kib(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def copy_tb_s(device: str, size: int = 2 << 30) -> float:
    """TB/s read and written by a copy on the device, the yardstick for calls that are bound by memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / median_ms([lambda: target.copy_(source)], device) / 1e9

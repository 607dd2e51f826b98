"""The monitor's numbers for a batch of positions: ours beside what is written today.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_boundary.py

R positions of one token each, vocabulary V. Every provider yields both KLs, both entropies and both
log-probabilities; ours also rank, argmax and the decision. Each is compared with float64 before it is timed.
The bytes are those of reading both sides' logits once, whatever is read: 2 R V times the element's size.
"""

import functools

import pytest
import torch

import motab_kernels as mk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 151936
# Inputs are rotated so that a GPU does not find them in its 50 MB of cache; on the CPU they exceed it anyway.
POSITIONS = (1, 8, 64, 512) if DEVICE == "cuda" else (1, 64)
ROTATE = 4 if DEVICE == "cuda" else 1
NAMES = mk.BoundaryOutput._fields[:6]


def widened(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


def eager(student, teacher, tokens):
    log_q, log_p = widened(student).log_softmax(-1), widened(teacher).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    gap = log_p - log_q
    column = tokens[:, None]
    return (
        (p * gap).sum(-1),
        -(q * gap).sum(-1),
        log_q.gather(-1, column).squeeze(-1),
        log_p.gather(-1, column).squeeze(-1),
        -(q * log_q).sum(-1),
        -(p * log_p).sum(-1),
    )


@functools.cache
def compiled():
    return torch.compile(eager, dynamic=False)


PROVIDERS = {"ours": lambda: mk.fused_kl_boundary, "eager": lambda: eager, "torch.compile": compiled}


@functools.cache
def inputs(positions, dtype, i):
    generator = torch.Generator(DEVICE).manual_seed(i)
    teacher = 3 * torch.randn(positions, V, generator=generator, device=DEVICE)
    student = teacher + torch.randn(positions, V, generator=generator, device=DEVICE)
    tokens = torch.randint(V, (positions,), generator=generator, device=DEVICE)
    return student.to(dtype), teacher.to(dtype), tokens


def check(call, student, teacher, tokens):
    """The first two positions against float64. PyTorch's float32 normaliser is off by 1e-5 at this size, its
    entropy by several times that."""
    found = call(student, teacher, tokens)[:6]
    expected = eager(student[:2].double(), teacher[:2].double(), tokens[:2])
    for name, x, y in zip(NAMES, found, expected, strict=True):
        tolerance = 2e-5 if call is mk.fused_kl_boundary else 1e-3
        torch.testing.assert_close(x[:2].double(), y, rtol=0, atol=tolerance, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_boundary(benchmark, provider, dtype, positions):
    call = PROVIDERS[provider]()
    batches = [inputs(positions, dtype, i) for i in range(ROTATE)]
    check(call, *batches[0])

    def run():
        for batch in batches:
            call(*batch)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"R = {positions}, {dtype}"
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    read = 2 * positions * V * dtype.itemsize * ROTATE
    benchmark.extra_info["GB/s"] = round(read / benchmark.stats.stats.median / 1e9, 2)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*batches[0])
        benchmark.extra_info["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20

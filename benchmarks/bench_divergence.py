"""Losses with their gradient, from logits: ours, eager PyTorch, torch.compile and Liger.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_divergence.py

R positions, vocabulary V, forward and backward; each loss and gradient is compared with float64 before it is timed. The
bytes are those of reading both sides' logits once forward and once backward, and of writing the gradient.
`python -m benchmarks.gpu` races the same providers on a GPU.
"""

import functools
import importlib.util
import time

import pytest
import torch

import motab_kernels as mk
from benchmarks.timing import SHORT, peak_mib, rounds, settle, synchronise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 151936
POSITIONS = 8192 if DEVICE == "cuda" else 512
KINDS = ("forward_kl", "reverse_kl", "jsd")


def eager(kind, student, teacher):
    """The mean over positions, by float32 log-probabilities."""
    log_q, log_p = ((x if x.dtype == torch.float64 else x.float()).log_softmax(-1) for x in (student, teacher))
    if kind == "forward_kl":
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif kind == "reverse_kl":
        rows = (log_q.exp() * (log_q - log_p)).sum(-1)
    elif kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
        rows = ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
    else:  # tvd
        rows = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return rows.mean()


def ours(kind, student, teacher):
    return mk.divergence_loss(student, teacher, divergence=kind)


@functools.cache
def compiled():
    return torch.compile(eager, dynamic=False)


def liger():
    """Liger's Triton JSD on log-probabilities; on a GPU only."""
    from liger_kernel.transformers import LigerJSD

    loss = LigerJSD(beta=0.5)
    return lambda kind, student, teacher: loss(student.log_softmax(-1), teacher.log_softmax(-1))


PROVIDERS = {"ours": lambda: ours, "eager": lambda: eager, "torch.compile": compiled, "liger": liger}


def inputs(positions, vocabulary, dtype, device=DEVICE):
    generator = torch.Generator(device).manual_seed(0)
    teacher = 3 * torch.randn(positions, vocabulary, generator=generator, device=device)
    student = teacher + torch.randn(positions, vocabulary, generator=generator, device=device)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def exact(kind, student, teacher):
    """In float64: the loss, some positions at a time, and the gradient of the first and the last position."""
    positions = len(student)
    total = 0.0
    with torch.no_grad():
        for start in range(0, positions, 32):
            part = slice(start, start + 32)
            loss = eager(kind, student[part].double(), teacher[part].double())
            total += loss.item() * min(32, positions - start)
    ends = [0, positions - 1]
    leaf = student.detach()[ends].double().requires_grad_()
    eager(kind, leaf, teacher[ends].double()).backward()
    return total / positions, leaf.grad * (2 / positions)


@functools.cache
def expected(kind, dtype):
    return exact(kind, *inputs(POSITIONS, V, dtype))


def check(call, kind, student, teacher, expected, backward=True):
    """Compare the timed call with `exact`; bfloat16 rounds a gradient to 0.2 %."""
    student.grad = None
    loss = call(kind, student, teacher)
    assert abs(loss.item() - expected[0]) < 1e-2 * expected[0], f"loss {loss.item()}, in float64 {expected[0]}"
    if backward:
        loss.backward()
        error = (student.grad[[0, len(student) - 1]].double() - expected[1]).norm() / expected[1].norm()
        assert error < 2e-2, f"gradient off by {error}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_divergence(benchmark, provider, dtype, kind):
    if provider == "liger" and (kind != "jsd" or DEVICE == "cpu" or importlib.util.find_spec("liger_kernel") is None):
        pytest.skip("LigerJSD needs liger-kernel and a GPU")
    call = PROVIDERS[provider]()
    student, teacher = inputs(POSITIONS, V, dtype)
    check(call, kind, student, teacher, expected(kind, dtype))

    def run():
        student.grad = None
        call(kind, student, teacher).backward()
        synchronise(DEVICE)

    benchmark.group = f"{kind}, forward and backward, {POSITIONS} x {V}, {SHORT[dtype]}"
    settle(DEVICE)
    student.grad = None
    start = time.perf_counter()
    benchmark.extra_info["peak MiB"] = peak_mib(run, DEVICE)
    count = rounds(time.perf_counter() - start)
    benchmark.pedantic(run, rounds=count, warmup_rounds=int(count == 5))
    moved = 5 * POSITIONS * V * dtype.itemsize
    benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)

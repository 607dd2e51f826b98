"""Losses with their gradient, from logits: ours beside what is written today.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_divergence.py

R positions, vocabulary V, forward and backward; each loss and gradient is compared with float64 before it is timed. The
bytes are those of reading both sides' logits once forward and once backward, and of writing the gradient.
"""

import functools
import importlib.util

import pytest
import torch

import motab_kernels as mk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 151936
POSITIONS = 8192 if DEVICE == "cuda" else 32
DTYPE = torch.bfloat16
KINDS = ("forward_kl", "reverse_kl", "jsd")


def eager(kind, student, teacher):
    """The mean over positions, by float32 log-probabilities."""
    log_q, log_p = ((x if x.dtype == torch.float64 else x.float()).log_softmax(-1) for x in (student, teacher))
    if kind == "forward_kl":
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif kind == "reverse_kl":
        rows = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
        rows = ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
    return rows.mean()


def ours(kind, student, teacher):
    return mk.divergence_loss(student, teacher, divergence=kind)


@functools.cache
def compiled():
    return torch.compile(eager, dynamic=False)


@functools.cache
def liger():
    """Liger's Triton JSD on log-probabilities; a GPU only."""
    from liger_kernel.transformers import LigerJSD

    loss = LigerJSD(beta=0.5)
    return lambda kind, student, teacher: loss(student.log_softmax(-1), teacher.log_softmax(-1))


PROVIDERS = {"ours": lambda: ours, "eager": lambda: eager, "torch.compile": compiled, "liger": liger}


@functools.cache
def inputs():
    generator = torch.Generator(DEVICE).manual_seed(0)
    teacher = 3 * torch.randn(POSITIONS, V, generator=generator, device=DEVICE)
    student = teacher + torch.randn(POSITIONS, V, generator=generator, device=DEVICE)
    return student.to(DTYPE).requires_grad_(), teacher.to(DTYPE)


def check(call, kind):
    """Two positions against float64: bfloat16 keeps 0.2 % of a gradient."""
    student, teacher = (x[:2].detach() for x in inputs())
    exact = student.double().requires_grad_()
    expected = eager(kind, exact, teacher.double())
    expected.backward()
    leaf = student.clone().requires_grad_()
    loss = call(kind, leaf, teacher)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-2 * expected.item()
    assert (leaf.grad.double() - exact.grad).norm() < 2e-2 * exact.grad.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_divergence(benchmark, provider, kind):
    if provider == "liger" and (kind != "jsd" or DEVICE == "cpu" or importlib.util.find_spec("liger_kernel") is None):
        pytest.skip("LigerJSD needs liger-kernel and a GPU")
    call = PROVIDERS[provider]()
    check(call, kind)
    student, teacher = inputs()

    def run():
        student.grad = None
        call(kind, student, teacher).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{kind}, {POSITIONS} x {V}, {DTYPE}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    moved = 5 * POSITIONS * V * DTYPE.itemsize
    benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        benchmark.extra_info["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20

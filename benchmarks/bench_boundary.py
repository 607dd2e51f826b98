"""The monitor's numbers for a batch of positions: ours, eager PyTorch and torch.compile.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_boundary.py

B rows of T tokens, vocabulary V. Every provider yields both KLs, both entropies and both log-probabilities; ours also
rank, argmax and the decision. Each is compared with float64 before it is timed. `read` only reads both sides' logits.
The bytes are those of reading the logits once: 2 B T V times the element's size. No call finds its inputs
in a cache. `python -m benchmarks.gpu` races the same providers on a GPU.
"""

import functools
import itertools

import pytest
import torch

import motab_kernels as mk
from benchmarks.timing import SHORT, peak_mib, rotations, synchronise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 151936
POSITIONS = (1, 8, 64, 512) if DEVICE == "cuda" else (1, 64)
NAMES = mk.BoundaryOutput._fields[:6]


def widened(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


def eager(student, teacher, tokens):
    log_q, log_p = widened(student).log_softmax(-1), widened(teacher).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    gap = log_p - log_q
    column = tokens[..., None]
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


def in_place(student, teacher, tokens):
    """Ours as called in a loop over tokens: state, outputs and workspace are allocated before. The boundary is on the
    device, because in a CUDA graph each number is a kernel of its own, which fills a tensor."""
    boundary = mk.EntropyBoundary(*torch.tensor([0.2, 1.0], dtype=torch.float64, device=tokens.device))
    state = boundary.new_state(len(tokens), tokens.device)
    out = mk.fused_kl_boundary(student, teacher, tokens, boundary=boundary)
    sizes = (len(tokens), tokens[0].numel(), student.shape[-1])
    workspace = mk.boundary_workspace(*sizes, tokens.device) if tokens.is_cuda else None
    return functools.partial(mk.fused_kl_boundary, boundary=boundary, state=state, out=out, workspace=workspace)


def merely_read(student, teacher, tokens):
    """Reads every byte of both once, and nothing else."""
    return [x.view(torch.float32).sum() for x in (student, teacher)]


#: By name, functions that make the call for given inputs.
PROVIDERS = {
    "ours": lambda *example: mk.fused_kl_boundary,
    "ours, buffers given": in_place,
    "eager": lambda *example: eager,
    "torch.compile": lambda *example: compiled(),
}


def inputs(shape, vocabulary, dtype, seed, device=DEVICE):
    generator = torch.Generator(device).manual_seed(seed)
    teacher = 3 * torch.randn(*shape, vocabulary, generator=generator, device=device)
    student = teacher + torch.randn(*shape, vocabulary, generator=generator, device=device)
    tokens = torch.randint(vocabulary, shape, generator=generator, device=device)
    return student.to(dtype), teacher.to(dtype), tokens


def check(call, name, student, teacher, tokens):
    """The first and last position against float64. PyTorch's float32 normaliser is off by 1e-5 at this size, its
    entropy by several times that."""
    found = call(student, teacher, tokens)[:6]
    tolerance = 2e-5 if name.startswith("ours") else 1e-3
    for at in (0, -1):
        one = [x.flatten(0, tokens.dim() - 1)[at] for x in (student, teacher, tokens)]
        expected = eager(one[0].double(), one[1].double(), one[2])
        for statistic, x, y in zip(NAMES, found, expected, strict=True):
            torch.testing.assert_close(x.flatten()[at].double(), y, rtol=0, atol=tolerance, msg=statistic)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("provider", [*PROVIDERS, "read"])
def test_boundary(benchmark, provider, dtype, positions):
    read = 2 * positions * V * dtype.itemsize
    batches = [inputs((positions,), V, dtype, seed) for seed in range(rotations(read, DEVICE))]
    call = merely_read if provider == "read" else PROVIDERS[provider](*batches[0])
    if call is not merely_read:
        check(call, provider, *batches[0])
    turns = itertools.cycle(batches)

    def run():
        call(*next(turns))
        synchronise(DEVICE)

    benchmark.group = f"boundary, B = {positions}, {SHORT[dtype]}"
    benchmark.pedantic(run, rounds=10, iterations=len(batches), warmup_rounds=2)
    benchmark.extra_info["GB/s"] = round(read / benchmark.stats.stats.median / 1e9, 2)
    benchmark.extra_info["peak MiB"] = peak_mib(lambda: call(*batches[0]), DEVICE)

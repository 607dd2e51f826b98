"""How the cost grows with B, T and V, of the monitor and of a loss with its gradient: ours and eager PyTorch.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_scaling.py

Along an axis the other two sizes are those of BASE. `python -m benchmarks.report` draws it.
"""

import pytest
import torch

from benchmarks import bench_boundary, bench_divergence
from benchmarks.timing import SHORT, settle, synchronise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = {"B": 64, "T": 1, "V": 151936} if DEVICE == "cuda" else {"B": 4, "T": 1, "V": 151936}
DTYPE = torch.bfloat16
DOUBLINGS = [2**i for i in range(6)]
SIZES = [
    *({**BASE, "B": n} for n in DOUBLINGS),
    *({**BASE, "T": n} for n in DOUBLINGS),
    *({**BASE, "V": n * BASE["V"] // 16} for n in DOUBLINGS),
]
CASES = {tuple(sizes.values()): sizes for sizes in SIZES}


@pytest.mark.parametrize("sizes", CASES.values(), ids=lambda sizes: "-".join(map(str, sizes.values())))
@pytest.mark.parametrize("op", ["boundary", "forward KL with gradient"])
@pytest.mark.parametrize("provider", ["ours", "eager"])
def test_scaling(benchmark, provider, op, sizes):
    B, T, V = sizes.values()
    student, teacher, tokens = bench_boundary.inputs((B, T), V, DTYPE, 0)
    if op == "boundary":
        call = bench_boundary.PROVIDERS[provider](student, teacher, tokens)
        bench_boundary.check(call, provider, student, teacher, tokens)
    else:
        call = bench_divergence.PROVIDERS[provider]()
        student, teacher = student.flatten(0, 1).requires_grad_(), teacher.flatten(0, 1)
        bench_divergence.check(
            call, "forward_kl", student, teacher, bench_divergence.exact("forward_kl", student, teacher)
        )

    def run():
        if op == "boundary":
            call(student, teacher, tokens)
        else:
            student.grad = None
            call("forward_kl", student, teacher).backward()
        synchronise(DEVICE)

    benchmark.group = f"{op}, by size, {SHORT[DTYPE]}"
    benchmark.extra_info.update(sizes, op=op, provider=provider)
    if op != "boundary":
        settle(DEVICE)
    benchmark.pedantic(run, rounds=5, warmup_rounds=2)

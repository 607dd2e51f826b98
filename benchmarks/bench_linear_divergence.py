"""A divergence of two language-model heads, with gradients for hidden states and weight: ours and the peers.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_linear_divergence.py

N positions, hidden size H, vocabulary V. JSD with beta 0.5; on a GPU also forward KL, the only divergence of fla, whose
kernel needs a GPU. Each gradient is compared with one in float32 before it is timed. `products` is the time of the four
matrix products alone: both sides' logits, and the two gradients. On a GPU they also race in chunks, several numbers of
which share the memory that ours takes. The peak on a GPU is the allocator's, beyond inputs
and the gradients of the run before.
`python -m benchmarks.gpu` races the same providers on a GPU.
"""

import functools
import importlib.util
import time
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import motab_kernels as mk
from benchmarks.timing import SHORT, peak_mib, rounds, synchronise
from motab_kernels import linear_head
from motab_kernels.linear_head import product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, H, V, DTYPE = (8192, 4096, 151936, torch.bfloat16) if DEVICE == "cuda" else (1024, 256, 151936, torch.float32)
KINDS = ("jsd", "forward_kl") if DEVICE == "cuda" else ("jsd",)
BETAS = {"jsd": 0.5, "forward_kl": 0.0}  # TRL's and Liger's names for them


def eager(kind, hidden, weight, teacher_hidden, teacher_weight):
    log_q = F.linear(hidden, weight).float().log_softmax(-1)
    log_p = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    return divergence(kind, log_q, log_p).mean()


def divergence(kind, log_q, log_p):
    if kind == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2


def ours(kind):
    return functools.partial(mk.fused_linear_divergence, divergence=kind)


@functools.cache
def compiled(kind):
    return torch.compile(functools.partial(eager, kind), dynamic=False)


def trl(kind):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(hidden, weight, teacher_hidden, teacher_weight):
        mask = torch.ones(1, hidden.shape[0], device=hidden.device)
        sides = (hidden[None], teacher_hidden[None], weight, teacher_weight)
        return _chunked_divergence_loss(*sides, mask, beta=BETAS[kind])[0]

    return loss


def liger(kind):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weights = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    module = LigerFusedLinearJSDLoss(**weights, beta=BETAS[kind], compiled=DEVICE == "cuda")

    def loss(hidden, weight, teacher_hidden, teacher_weight):
        labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        return module(hidden, weight, teacher_hidden, teacher_weight, labels)

    return loss


def fla(kind):
    from fla.modules.fused_kl_div import fused_kl_div_loss

    def loss(hidden, weight, teacher_hidden, teacher_weight):
        return fused_kl_div_loss(hidden, teacher_hidden, weight, teacher_weight)

    return loss


def products(hidden, weight, teacher_hidden, teacher_weight):
    logits = F.linear(hidden.detach(), weight.detach())
    F.linear(teacher_hidden, teacher_weight)
    logits @ weight.detach()
    logits.T @ hidden.detach()


def products_in_chunks(rows, chunks, hidden, weight, teacher_hidden, teacher_weight):
    """A call of the products that `fused_linear_divergence` makes: logits in float32 of some rows at a time, and the
    gradients of several such chunks together."""
    hidden, weight, N = hidden.detach(), weight.detach(), len(hidden)
    memory = weight.new_empty(min(N, rows * chunks), len(weight)).normal_()
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call():
        for start in range(0, N, rows * chunks):
            block = slice(start, start + rows * chunks)
            out = memory[: len(hidden[block])]
            for parts in zip(hidden[block].split(rows), teacher_hidden[block].split(rows), strict=True):
                for part, of_side in zip(parts, (weight, teacher_weight), strict=True):
                    product(part, of_side)
            torch.mm(out, weight, out=grad_hidden[block])
            grad_weight.addmm_(out.T, hidden[block], beta=1 if start else 0)

    return call


def products_of(*leaves):
    """By name, functions that make the call of the products alone, whole or in chunks that take the same memory."""
    found = {"products": lambda: functools.partial(products, *leaves)}
    for chunks in (1, 2, 3, linear_head.CHUNKS, 8):
        with mock.patch.object(linear_head, "CHUNKS", chunks):
            rows = linear_head.chunk_size_for(leaves[1], leaves[3])
        found[f"products, {chunks} x {rows}"] = functools.partial(products_in_chunks, rows, chunks, *leaves)
    return found


#: By name, functions that make the call for a divergence.
PROVIDERS = {
    "ours": ours,
    "eager": lambda kind: functools.partial(eager, kind),
    "torch.compile": compiled,
    "trl": trl,
    "liger": liger,
    "fla": fla,
}


def without(kind):
    """The providers that lack the divergence."""
    return () if kind == "forward_kl" else ("fla",)


def inputs(positions, hidden_size, vocabulary, dtype, device=DEVICE):
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape, scale):
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    def side():
        return random(positions, hidden_size, scale=1.0), random(vocabulary, hidden_size, scale=3 / hidden_size**0.5)

    return *(x.requires_grad_() for x in side()), *side()


def gradients(call, leaves):
    for x in leaves[:2]:
        x.grad = None
    loss = call(*leaves)
    loss.backward()
    return loss.detach(), leaves[0].grad, leaves[1].grad


def exact(kind, leaves, rows=128):
    """Loss and gradients, `rows` positions at a time, in float32."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in leaves)
    wide = weight.float()
    loss, grad_hidden, grad_weight = 0.0, torch.empty_like(hidden, dtype=torch.float32), torch.zeros_like(wide)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = F.linear(hidden[part].float(), wide).requires_grad_()
        log_q = logits.log_softmax(-1)
        log_p = F.linear(teacher_hidden[part].float(), teacher_weight.float()).log_softmax(-1)
        mean = divergence(kind, log_q, log_p).sum() / len(hidden)
        (grad,) = torch.autograd.grad(mean, logits)
        loss += mean.detach()
        grad_hidden[part] = grad @ wide
        grad_weight.addmm_(grad.T, hidden[part].float())
    return loss, grad_hidden, grad_weight


@functools.cache
def example(kind):
    leaves = inputs(N, H, V, DTYPE)
    return leaves, exact(kind, leaves)


def check(found, name, expected):
    """The relative errors of loss and gradients. Logits in bfloat16 make a gradient wrong by many per cent."""
    errors = {
        what: ((x.float() - y).norm() / y.norm()).item()
        for what, x, y in zip(("loss", "hidden", "weight"), found, expected, strict=True)
    }
    assert max(errors.values()) < (5e-3 if name == "ours" else 0.25), errors
    return {f"error of {what}": f"{error:.1e}" for what, error in errors.items()}


@pytest.mark.filterwarnings("ignore")  # the peers' and the compiler's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("provider", [*PROVIDERS, "products"])
def test_linear_divergence(benchmark, provider, kind):
    package = {"trl": "trl", "liger": "liger_kernel", "fla": "fla"}.get(provider)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if provider in without(kind):
        pytest.skip(f"{provider} has no {kind}")
    benchmark.group = f"fused linear {kind}, {N} x {H} x {V}, {SHORT[DTYPE]}"
    leaves, expected = example(kind)
    if provider == "products":
        benchmark.pedantic(products, args=leaves, rounds=3, warmup_rounds=1)
        return
    call = PROVIDERS[provider](kind)
    if provider in ("ours", "torch.compile"):
        gradients(call, leaves)  # compiles; the first call of ours takes 149 MiB more
    found = []

    def run():
        found.clear()
        found[:] = gradients(call, leaves)
        synchronise(DEVICE)

    for x in leaves[:2]:
        x.grad = torch.ones_like(x)  # an earlier run, or another provider's, left some
    # A call takes half a minute, so one serves several purposes.
    start = time.perf_counter()
    benchmark.extra_info["peak MiB"] = peak_mib(run, DEVICE)
    seconds = time.perf_counter() - start
    benchmark.extra_info.update(check(found, provider, expected))
    benchmark.pedantic(run, rounds=rounds(seconds))

"""A token for each row of logits: ours, PyTorch as transformers does it, eager and compiled, and transformers itself.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_sampling.py

B rows of V = 151936 logits, temperature 0.6. The others sort the vocabulary for top-p; ours is given a number for each
row, transformers draws with `torch.multinomial`, eager by dividing by exponential numbers, which is faster. Before the
timing, each is compared with the definition in float64: a token must be among those that the filters keep, and ours the
one that the number means. The bytes are those of the logits, once. `python -m benchmarks.gpu` races the same on a GPU.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import motab_kernels as mk
from benchmarks.timing import SHORT, peak_mib, rotations, synchronise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 151936
CASES = [(1, torch.float32), (8, torch.float32), (8, torch.bfloat16)]
TEMPERATURE = 0.6
#: top-k and top-p; 0 and 1 keep all tokens.
FILTERS = {"all tokens": (0, 1.0), "top-p 0.95": (0, 0.95), "top-k 20, top-p 0.95": (20, 0.95)}


def ours(logits, uniforms, top_k, top_p):
    settings = {"temperature": TEMPERATURE, "top_k": top_k, "top_p": top_p}
    return mk.sample_from_logits(logits, uniforms, **settings).token_ids


@functools.cache
def settings_of_rows(B, device, top_k, top_p):
    new = functools.partial(torch.full, (B,), device=device)
    return {"temperature": new(TEMPERATURE), "top_k": new(top_k, dtype=torch.int32), "top_p": new(top_p)}


def ours_of_rows(logits, uniforms, top_k, top_p):
    settings = settings_of_rows(len(logits), logits.device, top_k, top_p)
    return mk.sample_from_logits(logits, uniforms, **settings).token_ids


def eager(logits, uniforms, top_k, top_p):
    scores = logits.float() / TEMPERATURE
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, places = scores.sort(descending=False)
        needless = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        needless[:, -1] = False
        scores = scores.masked_fill(needless.scatter(1, places, needless), -torch.inf)
    probabilities = scores.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


@functools.cache
def compiled():
    return torch.compile(eager, dynamic=False)


def transformers(logits, uniforms, top_k, top_p):
    scores = TemperatureLogitsWarper(TEMPERATURE)(None, logits.float())
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


#: By name, functions that make the call.
PROVIDERS = {
    "ours": lambda: ours,
    "ours, settings of rows": lambda: ours_of_rows,
    "eager": lambda: eager,
    "torch.compile": compiled,
    "transformers": lambda: transformers,
}


def inputs(B, vocabulary, dtype, seed, device=DEVICE):
    generator = torch.Generator(device).manual_seed(seed)
    logits = 3 * torch.randn(B, vocabulary, generator=generator, device=device)
    return logits.to(dtype), torch.rand(B, generator=generator, device=device, dtype=torch.float64)


def check(call, name, logits, uniforms, top_k, top_p):
    """The first and the last row."""
    tokens = call(logits, uniforms, top_k, top_p)
    for at in (0, -1):
        x, token = logits[at].double() / TEMPERATURE, int(tokens[at])
        if top_k:
            x[x < x.topk(top_k).values[-1]] = -torch.inf
        ordered = x.sort(descending=True).values
        enough = ordered.softmax(0).cumsum(0) >= top_p - 1e-5  # off by what float32 may be
        least = ordered[enough.nonzero()[0, 0]] if top_p < 1 else -torch.inf
        weights = x.where(x >= least - 1e-3, -torch.inf).softmax(0)
        assert weights[token] > 0, f"{name} drew token {token}, which the filters exclude"
        if name.startswith("ours"):
            end, u = float(weights[: token + 1].sum()), float(uniforms[at])
            assert end > u - 1e-3, (end, u)
            assert end - float(weights[token]) < u + 1e-3, (end, u)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize(("B", "dtype"), CASES, ids=[f"{B}-{SHORT[dtype]}" for B, dtype in CASES])
@pytest.mark.parametrize("kept", FILTERS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_sampling(benchmark, provider, kept, dtype, B):
    read = B * V * dtype.itemsize
    batches = [inputs(B, V, dtype, seed) for seed in range(min(16, rotations(read, DEVICE)))]
    call = PROVIDERS[provider]()
    check(call, provider, *batches[0], *FILTERS[kept])
    turns = itertools.cycle(batches)

    def run():
        call(*next(turns), *FILTERS[kept])
        synchronise(DEVICE)

    benchmark.group = f"sampling, B = {B}, {kept}, {SHORT[dtype]}"
    benchmark.pedantic(run, rounds=5, iterations=4, warmup_rounds=1)
    benchmark.extra_info["GB/s"] = round(read / benchmark.stats.stats.median / 1e9, 2)
    benchmark.extra_info["peak MiB"] = peak_mib(lambda: call(*batches[0], *FILTERS[kept]), DEVICE)

"""New tokens attend to a cache whose rows differ in length: ours, transformers and PyTorch.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_attention.py

B rows of T new tokens, heads as in Qwen3-0.6B (16 of queries, 8 of keys and values, D = 128), rows of S / 4 to S
tokens. "Half of the rows" feeds every second row: transformers copies their keys and values first.
Each provider is compared with float64 before it is timed. The bytes are those of the keys and values of these rows.
`test_forward_pass` is a whole model on a RaggedKVCache, with this attention and with transformers' own.
`python -m benchmarks.gpu` races the same providers on a GPU.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import motab_kernels as mk
from benchmarks.timing import SHORT, peak_mib, synchronise
from motab_kernels.model_attention import on_ragged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H_Q, H, D = 16, 8, 128


class Case(NamedTuple):
    B: int
    T: int
    S: int
    half: bool = False

    def __str__(self):
        return f"B = {self.B}, T = {self.T}, S = {self.S}" + (", half of the rows" if self.half else "")


CASES = (Case(8, 1, 2048), Case(8, 1, 2048, half=True), Case(8, 16, 2048))
MODULE = SimpleNamespace(num_key_value_groups=H_Q // H, is_causal=True, training=False)


class Inputs(NamedTuple):
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor | None
    visible_length: int

    def read(self):
        """Bytes of the keys and values that the rows hold."""
        return int((self.lengths + self.query.shape[2]).sum()) * 2 * H * D * self.keys.element_size()

    def mask(self):
        slots = torch.arange(self.visible_length, device=self.query.device)
        last = self.lengths[:, None] + torch.arange(self.query.shape[2], device=self.query.device)
        return (slots <= last[:, :, None])[:, None]


def inputs(case, dtype, device=DEVICE):
    generator = torch.Generator(device).manual_seed(0)
    room = case.S + 64  # a cache is seldom full

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    keys, values = random(case.B, H, room, D), random(case.B, H, room, D)
    lengths = torch.linspace(case.S - case.T, case.S // 4, case.B, device=device).long()  # of one row, the longest
    rows = torch.arange(0, case.B, 2, device=device) if case.half else None
    lengths = lengths if rows is None else lengths[rows]
    query = random(len(lengths), case.T, H_Q, D).transpose(1, 2)
    return Inputs(query, keys, values, lengths, rows, int(lengths.max()) + case.T)


def visible(x):
    keys, values = (storage[:, :, : x.visible_length] for storage in (x.keys, x.values))
    return (keys, values) if x.rows is None else (keys.index_select(0, x.rows), values.index_select(0, x.rows))


def ours(x):
    options = {"rows": x.rows, "visible_length": x.visible_length}
    return lambda: mk.ragged_attention(x.query, x.keys, x.values, x.lengths, **options).transpose(1, 2)


def transformers_sdpa(x):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = x.mask()
    return lambda: sdpa_attention_forward(MODULE, x.query, *visible(x), mask)[0]


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(x):
    """PyTorch's attention with a mask that is a function."""
    from torch.nn.attention.flex_attention import create_block_mask

    sizes = (len(x.lengths), None, x.query.shape[2], x.visible_length)
    mask = create_block_mask(lambda b, h, t, slot: slot <= x.lengths[b] + t, *sizes, device=x.query.device)
    return lambda: compiled_flex()(x.query, *visible(x), block_mask=mask, enable_gqa=True).transpose(1, 2)


#: By name, functions that make the call for given inputs; they also make the mask, which serves all layers.
PROVIDERS = {"ours": ours, "transformers": transformers_sdpa, "flex_attention": flex_attention}


def check(call, x):
    """The first and the last row against float64."""
    found, mask = call(), x.mask()
    for i in (0, -1):
        row = i if x.rows is None else x.rows[i]
        keys, values = (
            storage[row, :, : x.visible_length].double().repeat_interleave(H_Q // H, 0)
            for storage in (x.keys, x.values)
        )
        scores = (x.query[i].double() @ keys.mT * D**-0.5).masked_fill(~mask[i], -torch.inf)
        exact = (scores.softmax(-1) @ values).transpose(0, 1)
        tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2  # the error of rounded weights
        torch.testing.assert_close(found[i].double(), exact, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("provider", PROVIDERS)
@torch.no_grad()
def test_attention(benchmark, provider, dtype, case):
    x = inputs(case, dtype)
    call = PROVIDERS[provider](x)
    check(call, x)

    def run():
        call()
        synchronise(DEVICE)

    benchmark.group = f"attention, {case}, {SHORT[dtype]}"
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    benchmark.extra_info["GB/s"] = round(x.read() / benchmark.stats.stats.median / 1e9, 2)
    benchmark.extra_info["peak MiB"] = peak_mib(call, DEVICE)


@functools.cache
def model_and_cache(B, S, room):
    """Qwen3 with 33 M parameters, of which 8 M are embeddings; the rows hold S // 4 to S random keys and values."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=S + room,
    )
    model = Qwen3ForCausalLM(config).eval().to(DEVICE)
    cache = mk.RaggedKVCache(config, B, S + room, device=DEVICE)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, B, config.num_key_value_heads, S, config.head_dim, device=DEVICE)
        cache.update(keys, values, layer)
    lengths = torch.linspace(S // 4, S, B, device=DEVICE).long()
    mk.truncate_kv_cache_(cache, lengths, max_length=S)
    return model, cache, lengths


@pytest.mark.parametrize("T", [1, 16])
@pytest.mark.parametrize("provider", ["ours", "transformers"])
@torch.no_grad()
def test_forward_pass(benchmark, provider, T):
    B, S = 8, 2048
    model, cache, lengths = model_and_cache(B, S, 16)
    token_ids = torch.randint(8192, (B, T), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(attention):
        with attention(model):
            logits = model(token_ids, **cache.prepare(T)).logits
        mk.truncate_kv_cache_(cache, lengths, max_length=S)
        synchronise(DEVICE)
        return logits

    attention = on_ragged_attention if provider == "ours" else nullcontext
    torch.testing.assert_close(run(attention), run(nullcontext), rtol=0, atol=1e-4)
    benchmark.group = f"forward pass, 33 M parameters, B = {B}, T = {T}, S = {S}, fp32"
    benchmark.pedantic(run, (attention,), rounds=10, warmup_rounds=1)

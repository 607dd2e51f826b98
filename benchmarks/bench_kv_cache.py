"""Dropping a ragged tail from a batch: ours, cropping row by row, and a new prefill.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_kv_cache.py

B rows of S tokens, each of which keeps a different number, in a DynamicCache of L layers, H heads, head size D.
"""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import motab_kernels as mk
from benchmarks.timing import synchronise
from motab_kernels.ragged_kv_cache import CACHE_ARGUMENT

B, S, L, H, D = 8, 512, 4, 2, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEPT = [S - 37 * row for row in range(B)]  # in equal steps from all to about half


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=H,
        head_dim=D,
    )
    return LlamaForCausalLM(config).eval().to(DEVICE)


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(0, 2048, (B, S), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@torch.no_grad()
def filled(model, cache, input_ids):
    model(input_ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
    return cache


def ours(model, cache, input_ids, kept):
    mk.truncate_kv_cache_(cache, kept)
    return cache


def crop_and_pad(model, cache, input_ids, kept):
    """Per row: crop, then pad on the left to the longest."""
    rows, width = kept.tolist(), int(kept.max())
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)
            padded = [
                torch.nn.functional.pad(states[row : row + 1, :, :length], (0, 0, width - length, 0))
                for row, length in enumerate(rows)
            ]
            setattr(layer, name, torch.cat(padded))
    return cache


@torch.no_grad()
def prefill_again(model, cache, input_ids, kept):
    """Feed the kept tokens once more, padded on the left."""
    rows, width = kept.tolist(), int(kept.max())
    ids, mask = torch.zeros_like(input_ids[:, :width]), torch.zeros_like(input_ids[:, :width])
    for row, length in enumerate(rows):
        ids[row, width - length :], mask[row, width - length :] = input_ids[row, :length], 1
    fresh = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: fresh}, logits_to_keep=1)
    return fresh


@pytest.mark.parametrize("method", [ours, crop_and_pad, prefill_again])
def test_dynamic_cache(benchmark, model, input_ids, method):
    kept = torch.tensor(KEPT, device=DEVICE)
    source = filled(model, DynamicCache(config=model.config), input_ids)

    def fresh_copy():
        cache = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in source.layers])
        return (model, cache, input_ids, kept), {}

    def run(*args):
        cache = method(*args)
        synchronise(DEVICE)
        return cache

    cache = run(*fresh_copy()[0])
    for row, length in enumerate(KEPT):
        for layer, whole in zip(cache.layers, source.layers, strict=True):
            torch.testing.assert_close(layer.keys[row, :, -length:], whole.keys[row, :, :length], rtol=0, atol=1e-4)
    benchmark.pedantic(run, setup=fresh_copy, rounds=10, warmup_rounds=2)


def test_ragged_cache(benchmark, model, input_ids):
    kept = torch.tensor(KEPT, device=DEVICE)
    cache = filled(model, mk.RaggedKVCache(model.config, B, S, device=DEVICE), input_ids)

    def run():
        mk.truncate_kv_cache_(cache, kept, max_length=S)
        synchronise(DEVICE)

    run()
    assert cache.lengths.tolist() == KEPT
    benchmark.pedantic(run, rounds=100, warmup_rounds=5)

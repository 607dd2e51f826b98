"""Tiny models with a RaggedKVCache, and what it should stand for."""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import motab_kernels as mk
from motab_kernels.model_attention import on_ragged_attention

VOCAB = 61
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Windows are shorter than the sequences; Gemma mixes windowed and full layers.
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "llama with a window that it ignores": dict(sliding_window=5),
    "mistral": dict(sliding_window=5),
    "gemma2": dict(sliding_window=5, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"] * 2),
    "gpt_oss": dict(
        sliding_window=5,
        num_local_experts=2,
        num_experts_per_tok=1,
        experts_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3_text": dict(sliding_window=5, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
}
BATCH = 3


def tiny_model(name, attention=None, layers=3):
    torch.manual_seed(0)
    if name == "gemma2" and attention is None:
        attention = "eager"  # the default of transformers 5.17, sdpa, leaves its softcap out
    sizes = SIZES | MODELS[name]
    sizes["num_hidden_layers"] = len(sizes.get("layer_types", range(layers)))
    config = AutoConfig.for_model(name.split()[0], **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float64).eval()


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """Eager attention rounds its probabilities to float32, which would hide errors below 1e-8."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))


@pytest.fixture
def llama():
    return tiny_model("llama")


def ragged_cache(model, max_length=64, **pages):
    return mk.RaggedKVCache(model.config, BATCH, max_length, device="cpu", dtype=torch.float64, **pages)


class Book:
    """A cache beside the plain token lists that it should stand for; a fresh pass has the model's own attention."""

    def __init__(self, model, cache, attention=contextlib.nullcontext):
        self.model, self.cache, self.attention = model, cache, attention
        self.tokens = [[] for _ in range(BATCH)]

    @torch.no_grad()
    def append(self, counts, rows=None, bounded=False):
        """Feed counts[i] random tokens to row rows[i], right-padded; check every logit against a fresh pass."""
        order = list(range(BATCH)) if rows is None else rows
        width = max(counts)
        input_ids = torch.randint(3, VOCAB, (len(order), width))
        bound = max(len(self.tokens[row]) for row in order) if bounded else None
        if self.cache.pages is not None:  # as much as is fed: padding goes elsewhere
            room = list(map(len, self.tokens))
            for row, count in zip(order, counts, strict=True):
                room[row] += count
            self.cache.reserve_(room)
        before = self.cache.visible_length
        with self.attention(self.model):
            inputs = self.cache.prepare(width, rows=None if rows is None else torch.tensor(rows), max_length=bound)
            if bounded:  # what lies beyond is not read
                assert self.cache.get_mask_sizes(width, 0) == (bound + width, 0)
            logits = self.model(input_ids=input_ids, **inputs).logits
        if bounded:
            assert self.cache.visible_length == max(before, bound + width)
        for index, (row, count) in enumerate(zip(order, counts, strict=True)):
            self.tokens[row] += input_ids[index, :count].tolist()
            if count:
                fresh = self.model(input_ids=torch.tensor([self.tokens[row]]), use_cache=False).logits[0, -count:]
                torch.testing.assert_close(logits[index, :count], fresh, rtol=0, atol=1e-10)
        self.truncate([len(tokens) for tokens in self.tokens])

    def truncate(self, lengths, **options):
        assert mk.truncate_kv_cache_(self.cache, torch.tensor(lengths), **options) is None
        self.tokens = [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]
        assert self.cache.lengths.tolist() == lengths
        assert self.cache.visible_length == max(lengths)


attentions = pytest.mark.parametrize(
    "attention", [contextlib.nullcontext, on_ragged_attention], ids=["masks", "ragged_attention"]
)

"""Rolling a RaggedKVCache back leaves no trace: the next logits are those of a fresh pass over each row alone."""

import contextlib
import subprocess
import sys
import types

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY
from motab_kernels.model_attention import RAGGED_ATTENTION, on_ragged_attention, takes_ragged_attention
from motab_kernels.ragged_kv_cache import CACHE_ARGUMENT
from motab_kernels.ragged_kv_cache_checks import check_positions, layer_types

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


def tiny_model(name, attention=None):
    torch.manual_seed(0)
    if name == "gemma2" and attention is None:
        attention = "eager"  # the default of transformers 5.17, sdpa, leaves its softcap out
    sizes = SIZES | MODELS[name]
    sizes["num_hidden_layers"] = len(sizes.get("layer_types", range(3)))
    config = AutoConfig.for_model(name.split()[0], **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float64).eval()


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """Eager attention rounds its probabilities to float32, which would hide errors below 1e-8."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny_model(request.param)


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


def dead_slots(book):
    """Of every layer's keys and values, (B, H, S, D), where no token lives."""
    slots = torch.arange(book.cache.max_length)
    return (slots >= book.cache.lengths[:, None])[:, None, :, None]


@attentions
def test_any_history_equals_a_fresh_pass(model, attention):
    generator = torch.Generator().manual_seed(1)
    draw = lambda high: int(torch.randint(0, high, (), generator=generator))  # noqa: E731
    book = Book(model, ragged_cache(model), attention)
    book.append([7, 3, 9])
    for _ in range(8):
        rows = torch.randperm(BATCH, generator=generator)[: 1 + draw(BATCH)].tolist()
        book.append([1 + draw(6) for _ in rows], rows, bounded=bool(draw(2)))
        if draw(2):
            book.truncate([draw(len(tokens) + 1) for tokens in book.tokens])
    book.truncate([0, min(2, len(book.tokens[1])), 0])
    book.append([4, 1, 8])


@attentions
def test_a_short_row_fits_beside_a_full_one(model, attention):
    """The room that a row needs is its own: 60 + 9 would exceed 64."""
    book = Book(model, ragged_cache(model), attention)
    book.append([60, 2, 1])
    with pytest.raises(ValueError, match=r"at most max_length = 64 .* got up to 60 cached \+ 9 new"):
        book.cache.prepare(9, rows=torch.tensor([1, 2]))
    book.append([5, 9], rows=[1, 2], bounded=True)
    book.append([4, 1, 3])


@attentions
def test_rows_share_pages(model, attention):
    """Any history again, of rows that grow into pages which others gave back; free ones hold nothing that is read."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda high: int(torch.randint(0, high, (), generator=generator))  # noqa: E731
    book = Book(model, ragged_cache(model, max_length=120, num_pages=5, page_size=64), attention)
    book.append([7, 3, 9])
    seen = set()
    for _ in range(10):
        free = [*book.cache.pages.free, 5]
        for layer in book.cache.layers:
            for storage in (layer.keys, layer.values):
                storage[free] = torch.nan
        rows = torch.randperm(BATCH, generator=generator)[: 1 + draw(BATCH)].tolist()
        # What is left of 120, also for padding, and of one page for the first row, so that five are enough.
        left = min(30, 120 - max(len(book.tokens[row]) for row in rows))
        counts = [1 + draw(min(left, 64 - len(book.tokens[0])) if row == 0 else left) for row in rows]
        book.append(counts, rows, bounded=bool(draw(2)))
        seen.add(tuple(map(len, book.cache.pages.of_row)))
        tail = "zero" if draw(2) else "keep"
        book.truncate([min(len(tokens), 40 + draw(50)) for tokens in book.tokens], tail=tail)
    assert len(seen) > 2
    assert max(map(sum, seen)) == 5
    assert book.cache.get_max_length() == 120


def test_a_tail_in_pages_is_zeroed(llama):
    cache = ragged_cache(llama, max_length=200, num_pages=6, page_size=64)
    book = Book(llama, cache, on_ragged_attention)
    book.append([70, 3, 100])
    for layer in cache.layers:
        layer.keys += 1
    before = [cache.pages.in_one_piece(layer.keys, cache.pages.table, 128) for layer in cache.layers]
    mk.truncate_kv_cache_(cache, torch.tensor([60, 3, 66]), tail="zero")
    for layer, expected in zip(cache.layers, before, strict=True):
        expected[0, :, 60:70], expected[2, :, 66:100] = 0, 0
        found = cache.pages.in_one_piece(layer.keys, cache.pages.table, 128)
        assert torch.equal(found[::2], expected[::2])
        assert torch.equal(found[1, :, :64], expected[1, :, :64])


def test_wrong_pages(llama):
    cache = ragged_cache(llama, max_length=128, num_pages=3, page_size=64)
    assert cache.can_reserve([64, 64, 1])
    assert not cache.can_reserve([64, 65, 1])
    with pytest.raises(ValueError, match="rows with pages to write to, got none: call reserve_ first"):
        cache.prepare(1)
    cache.reserve_([1, 65, 0])
    pages = [list(row) for row in cache.pages.of_row]
    with pytest.raises(ValueError, match=r"lengths: expected what 3 pages .* hold, got \[65, 64, 1\], which need 4"):
        cache.reserve_([65, 64, 1])
    for lengths in ([1, 2], [1, 2, -1], [0, 0, 129]):
        with pytest.raises(ValueError, match=r"lengths: expected 3 lengths in \[0, 128\], got"):
            cache.reserve_(lengths)
    assert cache.pages.of_row == pages
    assert cache.pages.table.tolist() == [[pages[0][0], 3], pages[1], [3, 3]]
    with torch.no_grad():
        llama(torch.ones(BATCH, 66, dtype=torch.long), **cache.prepare(66))
    with pytest.raises(ValueError, match=r"room for the 66 tokens of row 0, got room for 64: .* call reserve_"):
        cache.prepare(1)
    cache.prepare(1, rows=torch.tensor([1]))
    cache.reset()
    cache.reserve_([4, 4, 0])
    with torch.no_grad():
        llama(torch.ones(BATCH, 3, dtype=torch.long), **cache.prepare(3))
    cache.prepare(1)  # a row without pages is padding
    for wrong in ({"num_pages": 0}, {"num_pages": 2.0}):
        with pytest.raises(ValueError, match="num_pages: expected None or a positive int, got"):
            ragged_cache(llama, **wrong)
    for page_size in (0, 32, 64.0):
        with pytest.raises(ValueError, match="page_size: expected a multiple of 64 tokens, got"):
            ragged_cache(llama, num_pages=2, page_size=page_size)


@attentions
@torch.no_grad()
def test_a_bound_may_be_loose_and_a_pass_prepared_twice(llama, attention):
    """The host still knows the rows' one length, and what they can hold."""
    book = Book(llama, ragged_cache(llama), attention)
    book.append([4, 4, 4])
    with attention(llama):
        book.cache.prepare(50)  # of a pass that never came
        inputs = book.cache.prepare(2, max_length=40)
        assert book.cache.visible_length == 4
        llama(torch.randint(3, VOCAB, (BATCH, 2)), **inputs)
    assert (book.cache.visible_length, book.cache.get_seq_length()) == (6, 6)
    book.truncate([4, 4, 4])
    with attention(llama), pytest.raises(ValueError, match=r"got up to 63 cached \+ 2 new"):
        book.cache.prepare(2, max_length=63)
    book.append([1, 2, 2], rows=[2, 0, 1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("pages", [{}, {"num_pages": 3, "page_size": 64}])
def test_a_compiled_model_takes_it_whole(llama, pages):
    """Two graphs for passes of any length, of one token and of more, on all rows and on some; nothing breaks them."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(llama, fullgraph=True, dynamic=True, backend="eager")
    book = Book(llama, ragged_cache(llama, **pages), on_ragged_attention)
    book.append([1, 1, 1])  # keys and values are there
    book.attention = lambda model: on_ragged_attention(llama)
    # A fresh pass is the model's own.
    book.model = lambda use_cache, **inputs: (compiled if use_cache else llama)(use_cache=use_cache, **inputs)
    for counts, rows in (([3, 2, 5], None), ([4, 1], [2, 0]), ([1, 1, 1], None), ([1, 1], [1, 2]), ([6, 2], [1, 2])):
        book.append(counts, rows)
        book.append(counts, rows, bounded=True)
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_eager_attention(name):
    model = tiny_model(name, attention="eager")
    book = Book(model, ragged_cache(model))
    book.append([7, 3, 9])
    book.truncate([2, 3, 8])
    book.append([2, 5], rows=[2, 0])


def test_the_tail_may_hold_anything_finite(model):
    book = Book(model, ragged_cache(model))
    book.append([7, 3, 9])
    book.truncate([2, 3, 6], tail="keep")
    for layer in book.cache.layers:
        layer.keys.masked_fill_(dead_slots(book), 1e6)
        layer.values.masked_fill_(dead_slots(book), -1e6)
    book.append([1, 4, 2])


def test_a_nan_tail_survives_a_mask_and_is_zeroed_on_request(llama):
    for tail in ("keep", "zero"):
        book = Book(llama, ragged_cache(llama))
        book.append([7, 3, 9])
        for layer in book.cache.layers:
            for storage in (layer.keys, layer.values):
                storage[0, :, 2:7] = storage[2, :, 6:9] = torch.nan
        before = [layer.keys.clone() for layer in book.cache.layers]
        book.truncate([2, 3, 6], tail=tail)
        for layer, old in zip(book.cache.layers, before, strict=True):
            if tail == "zero":
                old[0, :, 2:7] = old[2, :, 6:9] = 0
            torch.testing.assert_close(layer.keys, old, rtol=0, atol=0, equal_nan=True)
        if tail == "zero":
            book.append([1, 4, 2])
        else:
            with pytest.raises(AssertionError, match="not close"):
                book.append([1, 4, 2])
    book = Book(llama, ragged_cache(llama), on_ragged_attention)  # which has no mask
    book.append([7, 3, 9])
    for layer in book.cache.layers:
        layer.keys[0, :, 2:7] = layer.values[2, :, 6:9] = torch.nan
    book.truncate([2, 3, 6])
    book.append([1, 4, 2])


def test_reset(llama):
    book = Book(llama, ragged_cache(llama))
    book.append([7, 3, 9])
    book.cache.reset()
    assert book.cache.lengths.tolist() == [0, 0, 0]
    assert book.cache.visible_length == 0


def test_generate_writes_what_it_writes_with_a_dynamic_cache(model):
    prompt = torch.randint(3, VOCAB, (BATCH, 6))
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    # Without a config, by which it would cut a Llama to a window that its attention knows nothing of.
    expected = model.generate(prompt, **{CACHE_ARGUMENT: transformers.DynamicCache()}, **options)
    cache = ragged_cache(model)
    assert torch.equal(model.generate(prompt, **{CACHE_ARGUMENT: cache}, **options), expected)
    assert cache.get_seq_length() == 14
    assert cache.get_max_length() == 64

    cache.crop(-5)  # a uniform rollback may be followed by a plain pass too
    with torch.no_grad():
        logits = model(input_ids=expected[:, 9:12], **{CACHE_ARGUMENT: cache}).logits[:, -1]
        fresh = model(input_ids=expected[:, :12], use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits, fresh, rtol=0, atol=1e-10)


def test_storage_outlives_inference_mode(llama):
    cache = ragged_cache(llama)
    ids = torch.randint(3, VOCAB, (BATCH, 4))
    with torch.inference_mode():
        llama(input_ids=ids, **cache.prepare(4))
    mk.truncate_kv_cache_(cache, 2, tail="zero")
    with torch.no_grad():
        llama(input_ids=ids, **cache.prepare(4))
    assert cache.lengths.tolist() == [6] * BATCH


def test_nothing_changes_when_the_tokens_do_not_fit(llama):
    book = Book(llama, ragged_cache(llama, max_length=10))
    book.append([7, 3, 9])
    before = [layer.keys.clone() for layer in book.cache.layers]
    with pytest.raises(ValueError, match=r"max_length = 10 tokens a row, got up to 9 cached \+ 2 new"):
        book.cache.prepare(2)
    assert book.cache.lengths.tolist() == [7, 3, 9]
    assert all(torch.equal(layer.keys, old) for layer, old in zip(book.cache.layers, before, strict=True))
    book.append([1, 1, 1])  # exactly full is allowed


def test_a_plain_pass_over_ragged_rows_is_refused(llama):
    book = Book(llama, ragged_cache(llama))
    book.append([7, 3, 9])
    with pytest.raises(ValueError, match="prepare"):
        llama(input_ids=torch.ones(BATCH, 1, dtype=torch.long), **{CACHE_ARGUMENT: book.cache})
    cache = ragged_cache(llama)
    with torch.no_grad():
        llama(torch.ones(BATCH, 4, dtype=torch.long), **cache.prepare(4))
        assert cache.get_seq_length() == 4
        llama(torch.ones(1, 1, dtype=torch.long), **cache.prepare(1, rows=torch.tensor([1])))
    with pytest.raises(ValueError, match="expected rows of one length"):
        cache.get_seq_length()


def test_crop_drops_as_many_of_each_row(llama):
    book = Book(llama, ragged_cache(llama))
    book.append([7, 3, 9])
    book.cache.crop(-2)
    assert book.cache.lengths.tolist() == [5, 1, 7]
    with pytest.raises(ValueError, match="max_length: expected an int that bounds new_lengths, got 4"):
        mk.truncate_kv_cache_(book.cache, torch.tensor([2, 1, 5]), max_length=4)
    book.truncate([2, 1, 5], max_length=8)  # which is not needed where the host knows the lengths
    with pytest.raises(ValueError, match="tokens_to_remove: expected a number <= 0, got 1"):
        book.cache.crop(1)


@attentions
@torch.no_grad()
def test_autocast_s_keys_are_cast_to_those_of_the_cache(llama, attention):
    llama.float()
    cache = mk.RaggedKVCache(llama.config, BATCH, 16, dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (BATCH, 3))
    with attention(llama), torch.autocast("cpu", torch.bfloat16):
        found = llama(ids, **cache.prepare(3)).logits
    assert cache.layers[0].keys.dtype == torch.float32
    torch.testing.assert_close(found.float(), llama(ids, use_cache=False).logits, rtol=0, atol=0.05)


@torch.no_grad()
def test_a_truncation_ends_a_pass_that_never_came(llama):
    cache = ragged_cache(llama)
    ids = torch.randint(3, VOCAB, (BATCH, 4))
    llama(ids, **cache.prepare(4))
    cache.prepare(5)
    mk.truncate_kv_cache_(cache, 2)
    found = llama(ids[:, 2:], **{CACHE_ARGUMENT: cache}).logits
    torch.testing.assert_close(found, llama(ids, use_cache=False).logits[:, 2:], rtol=0, atol=1e-10)


def test_an_empty_cache_is_truncated_to_nothing(llama):
    cache = ragged_cache(llama)
    mk.truncate_kv_cache_(cache, 0, tail="zero")
    assert cache.lengths.tolist() == [0] * BATCH


@pytest.mark.parametrize(
    ("new_lengths", "message"),
    [
        (10, "at most 9, got 10"),
        (-1, ">= 0, got -1"),
        (True, "int or a tensor"),
        (torch.tensor([7, 4, 9]), r"at most lengths = \[7, 3, 9\], got \[7, 4, 9\]"),
        (torch.tensor([-1, 0, 0]), ">= 0"),
        (torch.tensor([1, 2]), r"shape \(3,\)"),
        (torch.tensor([1.0, 2.0, 3.0]), "integer dtype"),
    ],
)
def test_wrong_lengths(llama, new_lengths, message):
    book = Book(llama, ragged_cache(llama))
    book.append([7, 3, 9])
    with pytest.raises(ValueError, match=message):
        mk.truncate_kv_cache_(book.cache, new_lengths)
    with pytest.raises(ValueError, match=r"max_length: expected a bound on the rows' lengths \[7, 3, 9\], got 8"):
        book.cache.prepare(1, max_length=8)
    assert book.cache.lengths.tolist() == [7, 3, 9]


def test_wrong_arguments(llama):
    cache = ragged_cache(llama)
    with pytest.raises(ValueError, match='"keep" or "zero"'):
        mk.truncate_kv_cache_(cache, 0, tail="drop")
    with pytest.raises(ValueError, match="knows its lengths"):
        mk.truncate_kv_cache_(cache, 0, torch.ones(BATCH, 1))
    with pytest.raises(ValueError, match="num_tokens: expected a positive int, got 0"):
        cache.prepare(0)
    for rows in (torch.tensor([0, 0]), torch.tensor([3]), torch.tensor([-1]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"rows: expected distinct ones within \[0, 3\)"):
            cache.prepare(1, rows=rows)
    with pytest.raises(ValueError, match="rows: expected None or"):
        cache.prepare(1, rows=[0])
    with pytest.raises(ValueError, match="max_length: expected None or an int of at least 0, got -1"):
        cache.prepare(1, max_length=-1)
    with pytest.raises(ValueError, match=r"keys: expected .* = \(\(3, 3\), torch.float64"):
        llama(input_ids=torch.ones(BATCH, 2, dtype=torch.long), **cache.prepare(3) | {"position_ids": None})
    with pytest.raises(ValueError, match="no_grad"):
        llama(input_ids=torch.ones(BATCH, 2, dtype=torch.long), **cache.prepare(2))
    with pytest.raises(ValueError, match="batch_size: expected a positive int"):
        mk.RaggedKVCache(llama.config, 0, 4)
    for refused in (cache.reorder_cache, cache.batch_repeat_interleave, cache.batch_select_indices):
        with pytest.raises(ValueError, match="RaggedKVCache"):
            refused(None)
    for max_length in (-1, 2.0):
        with pytest.raises(ValueError, match=f"max_length: expected an int that bounds new_lengths, got {max_length}"):
            mk.truncate_kv_cache_(cache, 0, max_length=max_length)
    with (
        pytest.raises(ValueError, match=r"ragged_step: expected what RaggedKVCache\.prepare gives .* got none"),
        on_ragged_attention(llama),
    ):
        llama(input_ids=torch.ones(BATCH, 2, dtype=torch.long))
    assert llama.config._attn_implementation == "sdpa"
    with (
        pytest.raises(ValueError, match=r"expected arguments that .* knows, got bias of LlamaAttention"),
        on_ragged_attention(llama),
        torch.no_grad(),
    ):
        llama(input_ids=torch.ones(BATCH, 2, dtype=torch.long), bias=torch.zeros(1), **cache.prepare(2))
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        cache.prepare(1)


def test_which_models_take_ragged_attention():
    model = tiny_model("llama").float()
    assert takes_ragged_attention(model) == HAS_LIBRARY
    assert not takes_ragged_attention(tiny_model("llama"))  # float64 has no kernels
    assert not takes_ragged_attention(tiny_model("llama", attention="eager").float())
    asked_for = tiny_model("gpt_oss", attention=RAGGED_ATTENTION).float()  # whose own is eager
    assert takes_ragged_attention(asked_for) == HAS_LIBRARY
    model.config.kv_lora_rank = 8
    assert not takes_ragged_attention(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.MambaConfig(num_hidden_layers=2), "layer 0 of"),
        (transformers.Lfm2Config(num_hidden_layers=2, layer_types=["full_attention", "conv"]), "layer 1 of 'conv'"),
        (transformers.Gemma3nTextConfig(num_hidden_layers=20, num_kv_shared_layers=10), "layer 10 sharing"),
        (transformers.FalconConfig(alibi=True), "got 'falcon', which adds a bias by distance"),
        (transformers.BloomConfig(), "got 'bloom', which adds a bias by distance"),
        (transformers.GPTNeoConfig(), "got 'gpt_neo', which counts the windows of its local attention"),
        (transformers.OpenAIGPTConfig(), "got 'openai-gpt', which takes no cache"),
    ],
)
def test_models_that_cannot_roll_back(config, message):
    with pytest.raises(ValueError, match=message):
        mk.RaggedKVCache(config, BATCH, 8)


def test_longrope_keeps_its_short_factors():
    """Beyond them the keys of all rows would change, those in the cache too."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "max_position_embeddings": 128}
    config = transformers.Phi3Config(**sizes, original_max_position_embeddings=32, rope_parameters=rope)
    mk.RaggedKVCache(config, BATCH, 32)
    with pytest.raises(ValueError, match=r"max_length: expected at most 32 for 'phi3', got 33: its rotary.*"):
        mk.RaggedKVCache(config, BATCH, 33)
    each = {"full_attention": {"rope_type": "default"}, "sliding_attention": config.rope_parameters}
    with pytest.raises(ValueError, match="max_length: expected at most 32 for 'some', got 33"):
        check_positions(types.SimpleNamespace(model_type="some", rope_parameters=each), 33)


def test_layers_that_reuse_keys_are_refused():
    config = types.SimpleNamespace(num_hidden_layers=2, layer_types=["full_attention"] * 2)
    assert layer_types(config) == ["full_attention"] * 2
    config.kv_sharing_modes = ["own", "reuse"]
    with pytest.raises(ValueError, match="expected layers with their own keys and values, got layer 1 sharing them"):
        layer_types(config)


def test_importing_the_package_imports_no_transformers():
    code = "import sys, motab_kernels; assert 'transformers' not in sys.modules; motab_kernels.RaggedKVCache"
    subprocess.run([sys.executable, "-c", code], check=True)

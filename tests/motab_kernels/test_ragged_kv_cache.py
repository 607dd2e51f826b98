"""Rolling a RaggedKVCache back leaves no trace: the next logits are those of a fresh pass over each row alone."""

import subprocess
import sys

import pytest
import ragged_kv_cache_cases
import torch
import transformers
from ragged_kv_cache_cases import BATCH, MODELS, VOCAB, Book, attentions, ragged_cache, tiny_model
from torch._dynamo.utils import counters

import motab_kernels as mk
from motab_kernels.model_attention import on_ragged_attention
from motab_kernels.ragged_kv_cache import CACHE_ARGUMENT

llama = ragged_kv_cache_cases.llama
softmax_in_float64 = ragged_kv_cache_cases.softmax_in_float64


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny_model(request.param)


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
def test_a_compiled_model_takes_it_whole(pages):
    """Two graphs for passes of any length, of one token and of more, on all rows and on some; nothing breaks them."""
    llama = tiny_model("llama", layers=2)  # a first and a last one; each takes seconds to trace
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


def test_importing_the_package_imports_no_transformers():
    code = "import sys, motab_kernels; assert 'transformers' not in sys.modules; motab_kernels.RaggedKVCache"
    subprocess.run([sys.executable, "-c", code], check=True)

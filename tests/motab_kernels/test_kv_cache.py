"""`truncate_kv_cache_` on the caches of transformers: exact, or refused before anything changes."""

import importlib
import os

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import Cache, EncoderDecoderCache, LinearAttentionLayer, QuantizedLayer

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY
from motab_kernels.ragged_kv_cache import CACHE_ARGUMENT
from motab_kernels.tensors import on_device

VOCAB, BATCH = 61, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not {"TRITON_INTERPRET", "MOTAB_PTX"} & set(os.environ),
    reason="needs a GPU, TRITON_INTERPRET=1 or MOTAB_PTX=80",
)
needs_library = pytest.mark.skipif(DEVICE != "cpu" or not HAS_LIBRARY, reason="needs a CPU and the C++ kernels")
every_kernel = pytest.mark.parametrize(
    "kernels", [pytest.param("cpu", marks=needs_library), pytest.param("gpu", marks=needs_triton)]
)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def filled(cache, batch=BATCH, slots=5, layers=2):
    for index in range(layers):
        cache.update(torch.randn(batch, 2, slots, 4), torch.randn(batch, 2, slots, 6), index)
    return cache


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def feed(model, cache, rows, mask, new_ids):
    """Append (B, q) tokens after what the mask says is cached; check each row against a fresh pass over it alone."""
    mask = torch.cat([mask, torch.ones_like(new_ids)], 1)
    count = new_ids.shape[1]
    positions = (mask.cumsum(-1) - 1)[:, -count:]
    logits = model(new_ids, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: cache}).logits
    rows = [row + new for row, new in zip(rows, new_ids.tolist(), strict=True)]
    for row, got in zip(rows, logits, strict=True):
        fresh = model(torch.tensor([row]), use_cache=False).logits[0, -count:]
        torch.testing.assert_close(got, fresh, rtol=0, atol=1e-10)
    return rows, mask


@pytest.mark.parametrize("tail", ["keep", "zero"])
@pytest.mark.parametrize("kept", [[9, 2, 4], [3, 3, 3], [1, 5, 2], [0, 6, 1], [10, 8, 5]])
def test_dynamic_cache_equals_a_fresh_pass(model, kept, tail):
    rows = [torch.randint(3, VOCAB, (length,)).tolist() for length in (7, 5, 2)]
    ids, mask = left_padded(rows)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **{CACHE_ARGUMENT: cache})
    rows, mask = feed(model, cache, rows, mask, torch.randint(3, VOCAB, (BATCH, 3)))

    mask = mk.truncate_kv_cache_(cache, torch.tensor(kept, dtype=torch.int32), mask, tail=tail)
    rows = [row[:length] for row, length in zip(rows, kept, strict=True)]
    assert torch.equal(mask, torch.tensor([[0] * (max(kept) - n) + [1] * n for n in kept]))
    assert cache.get_seq_length() == max(kept)
    rows, mask = feed(model, cache, rows, mask, torch.randint(3, VOCAB, (BATCH, 2)))

    # And a second time, back to one length.
    mask = mk.truncate_kv_cache_(cache, 2, mask, tail=tail)
    feed(model, cache, [row[:2] for row in rows], mask, torch.randint(3, VOCAB, (BATCH, 4)))


@pytest.mark.parametrize("tail", ["keep", "zero"])
def test_static_cache_equals_a_fresh_pass(model, tail):
    rows = torch.randint(3, VOCAB, (BATCH, 6)).tolist()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.tensor(rows), **{CACHE_ARGUMENT: cache})
    mask = mk.truncate_kv_cache_(cache, 4, tail=tail)
    assert torch.equal(mask, torch.ones(BATCH, 4, dtype=torch.int64))
    for storage in (x for layer in cache.layers for x in (layer.keys, layer.values)):
        assert bool((storage[:, :, 4:6] == 0).all()) == (tail == "zero")
    feed(model, cache, [row[:4] for row in rows], mask, torch.randint(3, VOCAB, (BATCH, 3)))


def test_a_static_cache_keeps_the_first_slots_of_its_mask():
    cache = filled(StaticCache(config=transformers.LlamaConfig(num_hidden_layers=2), max_cache_len=8))
    mask = torch.tensor([[0, 1, 1, 1, 1]] * BATCH)
    assert torch.equal(mk.truncate_kv_cache_(cache, 2, mask), mask[:, :2])


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_library)])
def test_keys_of_inference_mode_and_keys_with_gradients(backend):
    """Both may be moved; outside of inference mode, and of a model that was run without no_grad."""
    kept, leaf = torch.tensor([1, 3, 2]), torch.ones((), requires_grad=True)
    with torch.inference_mode():
        made = filled(DynamicCache())
    graded = DynamicCache()
    for index, layer in enumerate(made.layers):
        graded.update(layer.keys.clone() * leaf, layer.values.clone() * leaf, index)
    for cache in (made, graded):
        mk.truncate_kv_cache_(cache, kept, backend=backend)
    for one, other in zip(made.layers, graded.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_a_mask_of_any_dtype(dtype):
    """What is not 0 is a token; the new mask is of its dtype."""
    mask = 2 * torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    new = mk.truncate_kv_cache_(filled(DynamicCache()), torch.tensor([1, 3, 2]), mask.to(dtype))
    assert new.dtype == dtype
    assert new.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]


def test_nan_in_the_dead_tail_is_cleared(model):
    rows = torch.randint(3, VOCAB, (BATCH, 6)).tolist()
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor(rows), **{CACHE_ARGUMENT: cache})
    kept = [2, 6, 0]
    for layer in cache.layers:
        for row, length in enumerate(kept):
            layer.keys[row, :, length:] = layer.values[row, :, length:] = torch.nan
    mask = mk.truncate_kv_cache_(cache, torch.tensor(kept), tail="zero")
    feed(model, cache, [row[:n] for row, n in zip(rows, kept, strict=True)], mask, torch.randint(3, VOCAB, (BATCH, 2)))


def test_moves_what_is_kept_and_nothing_else():
    cache = filled(DynamicCache())
    storage = cache.layers[1].values
    before = storage.clone()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    new_mask = mk.truncate_kv_cache_(cache, torch.tensor([1, 3, 2]), mask)
    assert new_mask.tolist() == [[False, False, True], [True, True, True], [False, True, True]]
    expected = before.clone()
    expected[0, :, 2:3] = before[0, :, 1:2]
    expected[2, :, 1:3] = before[2, :, 2:4]
    assert torch.equal(storage, expected)
    assert torch.equal(cache.layers[1].values, expected[:, :, :3])


def test_keeping_everything_changes_nothing():
    cache = filled(DynamicCache())
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    assert mk.truncate_kv_cache_(cache, 5, tail="zero").tolist() == [[1] * 5] * BATCH
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@every_kernel
@pytest.mark.parametrize("clear_padding", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(
    ("slots", "size", "padding"),
    [
        (90, 5, 2),  # an odd size and padded strides: narrow words
        (800, 64, 16),  # 16-byte words and, in every dtype, rows of several blocks
        (90, 8, 0),  # slots that touch
    ],
)
@pytest.mark.parametrize("batch", [1, 6])
def test_kernels_equal_the_reference(kernels, batch, slots, size, padding, dtype, clear_padding):
    kernels = importlib.import_module(f"motab_kernels.{kernels}.kv_cache")
    from motab_kernels.reference import kv_cache as reference

    width = 2 * slots // 3
    # Moves to the right and to the left that overlap themselves, one that does not, none, and nothing to keep.
    rows = [(0, width - 5), (3, width), (slots - 9, 9), (1, 4), (7, width - 7), (slots, 0)][:batch]
    starts, lengths = map(list, zip(*rows, strict=True))
    generator = torch.Generator().manual_seed(slots)
    # Heads differ between storages; what surrounds each view is compared too.
    expected = [
        torch.randint(-99, 99, (batch + 1, 1 + index, slots + 3, size + padding), generator=generator).to(dtype)
        for index in range(2)
    ]
    got = [storage.to(DEVICE, copy=True) for storage in expected]
    view = lambda storage: storage[:batch, :, 1 : slots + 1, :size]  # noqa: E731
    kernels.realign_([view(storage) for storage in got], starts, lengths, width, clear_padding=clear_padding)
    reference.realign_([view(storage) for storage in expected], starts, lengths, width, clear_padding=clear_padding)
    for storage, reference_storage in zip(got, expected, strict=True):
        assert torch.equal(storage.cpu(), reference_storage)


@every_kernel
def test_backends_agree_on_a_cache(kernels):
    kept = torch.tensor([1, 3, 2])
    caches = []
    for backend in ("torch", "cpu" if kernels == "cpu" else "triton"):
        torch.manual_seed(0)
        caches.append(filled(DynamicCache()))
        mk.truncate_kv_cache_(caches[-1], kept, backend=backend)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@needs_library
def test_keys_with_a_stride_along_d():
    """No kernel moves them, and PyTorch does."""

    def strided():
        torch.manual_seed(0)
        cache = filled(DynamicCache())
        for layer in cache.layers:
            layer.keys = layer.keys.mT.contiguous().mT
        return cache

    kept = torch.tensor([1, 3, 2])
    expected, cache = filled(DynamicCache()), strided()
    for layer, other in zip(expected.layers, cache.layers, strict=True):
        layer.keys, layer.values = other.keys.clone(memory_format=torch.contiguous_format), other.values.clone()
    with pytest.raises(ValueError, match=r'"cpu" expected keys and values contiguous along D.*use "torch"'):
        mk.truncate_kv_cache_(cache, kept, backend="cpu")
    mk.truncate_kv_cache_(cache, kept)
    mk.truncate_kv_cache_(expected, kept, backend="torch")
    for one, other in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def mistral_config():
    return AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=6)


def test_sliding_layers_before_and_after_eviction():
    cache = filled(DynamicCache(config=mistral_config()), slots=5)
    mask = mk.truncate_kv_cache_(cache, torch.tensor([2, 3, 1]))
    assert mask.shape == (BATCH, 3)
    assert cache.get_seq_length() == 3
    assert cache.get_mask_sizes(1, 0) == (4, 0)

    cache = filled(DynamicCache(config=mistral_config()), slots=7)
    before = cache.layers[0].keys.clone()
    with pytest.raises(ValueError, match="layer 0 of DynamicSlidingWindowLayer, whose window"):
        mk.truncate_kv_cache_(cache, 5)
    assert torch.equal(cache.layers[0].keys, before)


def quantised():
    class Layer(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    return Cache(layers=[Layer()])


class Linear(DynamicCache):
    def __init__(self):
        super().__init__()
        self.layers = [*filled(DynamicCache(), layers=1).layers, LinearAttentionLayer()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), "got EncoderDecoderCache"),
        (quantised, "got Cache"),
        (Linear, "layer 1 of LinearAttentionLayer"),
        (DynamicCache, "an empty one"),
        (lambda: DynamicCache(config=mistral_config()), "an empty layer 0 of DynamicSlidingWindowLayer"),
        (lambda: filled(StaticCache(config=mistral_config(), max_cache_len=16)), "layer 0 of StaticSlidingWindowLayer"),
        (lambda: "cache", "got str"),
    ],
)
def test_caches_that_cannot_roll_back(make, message):
    with pytest.raises(ValueError, match=message):
        mk.truncate_kv_cache_(make(), 1)


@pytest.mark.parametrize(
    ("new_lengths", "options", "message"),
    [
        (6, {}, r"at most the rows' tokens \[5, 5, 5\], got \[6, 6, 6\]"),
        (-1, {}, ">= 0"),
        ([1, 2, 3], {}, "int or a tensor"),
        (torch.ones(2, dtype=torch.long), {}, r"shape \(3,\)"),
        (1, dict(attention_mask=torch.ones(3, 4)), r"shape \(3, 5\), got \(3, 4\)"),
        (1, dict(attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 3)), "padding on the left"),
        (1, dict(tail="drop"), '"keep" or "zero"'),
        (1, dict(max_length=3), "max_length: expected None except for a RaggedKVCache, got DynamicCache"),
    ],
)
def test_wrong_arguments_change_nothing(new_lengths, options, message):
    cache = filled(DynamicCache())
    before = cache.layers[0].keys.clone()
    with pytest.raises(ValueError, match=message):
        mk.truncate_kv_cache_(cache, new_lengths, **options)
    assert torch.equal(cache.layers[0].keys, before)


def test_a_static_cache_has_one_length():
    cache = filled(StaticCache(config=transformers.LlamaConfig(num_hidden_layers=2), max_cache_len=8))
    with pytest.raises(ValueError, match=r"one length in a StaticCache, got \[1, 2, 3\]"):
        mk.truncate_kv_cache_(cache, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="at most 5, got 6"):
        mk.truncate_kv_cache_(cache, 6)


def test_numbers_go_to_the_device_that_is_named_whatever_the_default():
    with torch.device("meta"):
        assert on_device([3, 4], torch.device("cpu")).tolist() == [3, 4]


@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("cpu", marks=needs_library), pytest.param("triton", marks=needs_triton)]
)
def test_keys_that_autograd_has_saved_are_not_moved_in_silence(backend):
    cache = filled(DynamicCache())
    leaf = torch.ones(4, requires_grad=True)
    loss = (cache.layers[0].keys * leaf).sum()
    mk.truncate_kv_cache_(cache, torch.tensor([5, 2, 3]), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

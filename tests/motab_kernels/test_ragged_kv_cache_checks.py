"""What a RaggedKVCache refuses: models, lengths, rows, pages and passes; and what it then leaves as it was."""

import types

import numpy as np
import pytest
import ragged_kv_cache_cases
import torch
import transformers
from ragged_kv_cache_cases import BATCH, Book, ragged_cache, tiny_model

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY
from motab_kernels.model_attention import RAGGED_ATTENTION, on_ragged_attention, takes_ragged_attention
from motab_kernels.ragged_kv_cache import CACHE_ARGUMENT
from motab_kernels.ragged_kv_cache_checks import check_positions, layer_types

llama = ragged_kv_cache_cases.llama


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
    for wrong in ({"num_pages": 0}, {"num_pages": 2.0}, {"num_pages": True}):
        with pytest.raises(ValueError, match="num_pages: expected an integer >= 1, got"):
            ragged_cache(llama, **wrong)
    for page_size in (0, 32, 64.0):
        with pytest.raises(ValueError, match="page_size: expected a multiple of 64 tokens, got"):
            ragged_cache(llama, num_pages=2, page_size=page_size)


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


def test_integers_of_numpy(llama):
    cache = mk.RaggedKVCache(
        llama.config, *np.array([2, 128]), num_pages=np.int64(2), page_size=np.int64(64), dtype=torch.float64
    )
    cache.reserve_(np.array([5, 5]))
    with torch.no_grad():
        llama(torch.ones(2, 5, dtype=torch.long), **cache.prepare(np.int64(5), max_length=np.int64(0)))
    mk.truncate_kv_cache_(cache, np.int64(3), max_length=np.int64(3))
    assert cache.lengths.tolist() == [3, 3]


def test_wrong_arguments(llama):
    cache = ragged_cache(llama)
    with pytest.raises(ValueError, match='"keep" or "zero"'):
        mk.truncate_kv_cache_(cache, 0, tail="drop")
    with pytest.raises(ValueError, match="knows its lengths"):
        mk.truncate_kv_cache_(cache, 0, torch.ones(BATCH, 1))
    with pytest.raises(ValueError, match="num_tokens: expected an integer >= 1, got 0"):
        cache.prepare(0)
    for rows in (torch.tensor([0, 0]), torch.tensor([3]), torch.tensor([-1]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"rows: expected distinct ones within \[0, 3\)"):
            cache.prepare(1, rows=rows)
    with pytest.raises(ValueError, match="rows: expected None or"):
        cache.prepare(1, rows=[0])
    with pytest.raises(ValueError, match="max_length: expected an integer >= 0, got -1"):
        cache.prepare(1, max_length=-1)
    with pytest.raises(ValueError, match=r"keys: expected .* = \(\(3, 3\), torch.float64"):
        llama(input_ids=torch.ones(BATCH, 2, dtype=torch.long), **cache.prepare(3) | {"position_ids": None})
    with pytest.raises(ValueError, match="no_grad"):
        llama(input_ids=torch.ones(BATCH, 2, dtype=torch.long), **cache.prepare(2))
    for batch_size in (0, True):
        with pytest.raises(ValueError, match="batch_size: expected an integer >= 1"):
            mk.RaggedKVCache(llama.config, batch_size, 4)
    for refused in (cache.reorder_cache, cache.batch_repeat_interleave, cache.batch_select_indices):
        with pytest.raises(ValueError, match="RaggedKVCache"):
            refused(None)
    for max_length in (-1, 2.0, True):
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
        (
            transformers.MambaConfig(num_hidden_layers=2),
            "(layer with attention|attention layers), got|they can be rolled back with transformers 5.24",
        ),
        (
            transformers.MiniMaxConfig(num_hidden_layers=2),
            "'minimax', which keeps its states in a cache of its own",
        ),
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


def test_a_window_of_which_nothing_tells_whether_it_is_used():
    """InternLM 3's code, that of Llama, lies elsewhere, and attends to all tokens; a user's own may lie anywhere."""
    if "internlm3" not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have InternLM 3")
    config = transformers.AutoConfig.for_model("internlm3", num_hidden_layers=2)
    assert layer_types(config) == ["full_attention"] * 2
    config.sliding_window = 5
    own = types.SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, sliding_window=5, model_type="own")
    for unknown in (config, own):
        with pytest.raises(ValueError, match=r"expected layer_types, or the model's code beside .* set layer_types"):
            layer_types(unknown)
        unknown.layer_types = ["sliding_attention", "full_attention"]
        assert layer_types(unknown) == unknown.layer_types

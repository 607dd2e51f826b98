"""Rows of models with recurrent states, rolled back, against passes over the texts that they should hold."""

import contextlib

import pytest
import torch
from transformers import AutoConfig
from transformers.cache_utils import Cache

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY
from motab_kernels.model_attention import on_ragged_attention
from motab_kernels.recurrent_layer import RecurrentStates
from tests.recurrent_models import MODELS, VOCAB, recurrent_model

BATCH = 3
#: transformers' Mamba begins anew with each part of a text that has several tokens.
KINDS = [name for name in MODELS if name != "jamba"]


class Book:
    """A cache beside the plain texts that it should stand for."""

    def __init__(self, model, attention=contextlib.nullcontext, tolerance=1e-5, **pages):
        dtype = model.dtype
        self.model, self.attention, self.tolerance = model, attention, tolerance
        self.cache = mk.RaggedKVCache(model.config, BATCH, 64, device="cpu", dtype=dtype, **pages)
        self.cache.reserve_([64] * BATCH)
        self.tokens = [[] for _ in range(BATCH)]
        self.numbers = {}  # of rows, one tensor for all passes

    @torch.no_grad()
    def append(self, count, rows=None):
        """Feed `count` random tokens to these rows, and compare every logit with a fresh pass."""
        order = list(range(BATCH)) if rows is None else rows
        ids = torch.randint(3, VOCAB, (len(order), count))
        numbers = None if rows is None else self.numbers.setdefault(tuple(rows), torch.tensor(rows))
        with self.attention(self.model):
            logits = self.model(input_ids=ids, **self.cache.prepare(count, rows=numbers)).logits
        for index, row in enumerate(order):
            self.tokens[row] += ids[index].tolist()
            fresh = self.model(input_ids=torch.tensor([self.tokens[row]]), use_cache=False).logits[0, -count:]
            torch.testing.assert_close(logits[index], fresh, rtol=0, atol=self.tolerance)
        assert self.cache.lengths.tolist() == list(map(len, self.tokens))

    def truncate(self, *lengths):
        mk.truncate_kv_cache_(self.cache, torch.tensor(lengths))
        self.tokens = [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]
        assert self.cache.lengths.tolist() == self.cache.states.settled_lengths.tolist() == list(lengths)


def write(book):
    """Passes of one token and of several, of all rows and of some, that are kept, cut back and forgotten."""
    book.append(7)
    book.truncate(7, 7, 7)
    book.append(3, [1])
    book.append(1, [2, 0])
    book.append(1, [2, 0])
    book.truncate(7, 10, 9)  # of the last passes, row 0 is cut back
    book.append(1)
    book.append(5)
    book.truncate(13, 0, 9)
    book.append(2)
    book.append(4, [1])
    book.append(1, [1])
    book.truncate(15, 2, 11)
    book.append(1, [2])
    book.append(3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_kind(name, attention):
    torch.manual_seed(1)
    write(Book(recurrent_model(name, attention=attention)))


@pytest.mark.skipif(not HAS_LIBRARY, reason="without kernels for the CPU there is no ragged_attention")
@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "lfm3", "nemotron_h", "granitemoehybrid", "zaya"])
@pytest.mark.parametrize("pages", [{}, {"num_pages": 3, "page_size": 64}])
def test_ragged_attention(name, pages):
    torch.manual_seed(2)
    model = recurrent_model(name, attention="sdpa", dtype=torch.float32)
    write(Book(model, on_ragged_attention, **pages))


def test_a_model_that_mixes_windows_and_states():
    model = recurrent_model("lfm2", layer_types=["conv", "sliding_attention", "conv", "full_attention"])
    model.config.sliding_window = 5
    cache = mk.RaggedKVCache(model.config, BATCH, 8, dtype=torch.float64)
    masks = cache.prepare(7)["attention_mask"]
    assert (masks["conv"], masks["full_attention"][0, 0, 6].tolist()) == (None, [True] * 7)
    assert masks["sliding_attention"][0, 0, 6].tolist() == [False] * 2 + [True] * 5


def test_lengths_without_a_state():
    """On the CPU they are refused, and nothing changes; where the host does not look, a row is cut further."""
    book = Book(recurrent_model("qwen3_5_text"))
    book.append(4)
    book.truncate(4, 4, 0)
    book.append(3)
    for lengths in ([6, 7, 3], [7, 3, 3], [4, 4, 2]):
        with pytest.raises(ValueError, match="expected lengths of which there are recurrent states, as"):
            mk.truncate_kv_cache_(book.cache, torch.tensor(lengths))
    assert book.cache.lengths.tolist() == [7, 7, 3]
    restorable = book.cache.states.restorable(torch.tensor([6, 3, 2]), book.cache.lengths)
    assert restorable.tolist() == [4, 0, 0]
    book.append(2)
    book.truncate(9, 4, 0)
    book.append(1)


def test_anchored_states():
    """Of rows that have not gone beyond what is safe; a row that keeps nothing has none."""
    book = Book(recurrent_model("qwen3_5_text"))
    book.append(4)
    book.truncate(4, 4, 4)
    book.cache.states.anchor_(torch.tensor([4, 9, 3]))
    assert book.cache.states.anchored_lengths.tolist() == [4, 4, 0]
    for _ in range(2):
        book.append(2)
        book.truncate(*book.cache.lengths.tolist())
    restorable = book.cache.states.restorable(torch.tensor([7, 4, 7]), book.cache.lengths)
    assert restorable.tolist() == [4, 4, 0]
    book.append(1)
    book.truncate(8, 4, 0)  # settled, anchored, none
    book.append(3)
    book.truncate(11, 4, 0)
    book.cache.states.anchor_(torch.tensor([11, 4, -1]))
    assert book.cache.states.anchored_lengths.tolist() == [11, 4, 0]
    book.append(2)
    book.truncate(13, 6, 2)
    book.append(1)
    book.truncate(11, 4, 0)
    book.append(2)
    book.truncate(0, 6, 2)
    assert book.cache.states.anchored_lengths.tolist() == [0, 4, 0]
    book.append(2)
    book.truncate(2, 8, 4)
    book.cache.states.anchor_(torch.tensor([2, 8, 4]))
    book.append(1)
    book.truncate(3, 9, 5)
    book.append(1)
    book.truncate(2, 9, 4)  # a single token behind
    book.append(2)


def test_a_pass_with_other_rows_settles_the_one_before():
    book = Book(recurrent_model("lfm2"))
    book.append(2, [0, 2])
    book.append(3, [1])
    assert book.cache.states.settled_lengths.tolist() == [2, 0, 2]
    book.append(1, [1])  # the same rows go on
    assert book.cache.states.settled_lengths.tolist() == [2, 0, 2]
    book.truncate(2, 0, 2)
    book.append(2)


def test_what_is_not_finite_goes_with_its_tokens():
    book = Book(recurrent_model("qwen3_5_text"))
    book.append(4)
    book.truncate(4, 4, 4)
    book.append(1)
    for layer in book.cache.states.layers:
        for states in (layer.conv_states, layer.recurrent_states):
            states[0].fill_(torch.nan)
    book.tokens = [tokens[:4] for tokens in book.tokens]
    book.truncate(4, 0, 4)
    book.append(3)


def test_reset():
    book = Book(recurrent_model("falcon_h1"))
    book.append(5, [0, 1])
    book.truncate(5, 5, 0)  # settles the states
    book.cache.reset()
    book.tokens = [[] for _ in range(BATCH)]
    book.append(6)


def test_states_made_in_inference_mode():
    book = Book(recurrent_model("bamba"))
    with torch.inference_mode():
        book.append(3)
        book.truncate(3, 3, 3)
    book.append(2)
    book.truncate(5, 3, 5)
    book.append(1)


@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba"])
def test_states_used_within_and_outside_of_inference_mode(name):
    with torch.inference_mode():
        book = Book(recurrent_model(name))
        book.append(3)
    book.append(2)
    book.truncate(5, 5, 5)
    with torch.inference_mode():
        book.append(2)
        book.append(1, [1])
    book.append(1, [1])
    book.truncate(7, 9, 7)
    book.append(2)


def test_rows_that_change_in_their_tensor():
    """A pass with other rows in the same tensor, and a truncation after the tensor has changed."""
    book = Book(recurrent_model("lfm2"))
    book.append(3)
    rows = torch.tensor([0])
    book.numbers = {(0,): rows, (1,): rows}
    book.append(1, [0])
    rows[0] = 1
    book.append(1, [1])
    rows[0] = 2
    book.truncate(4, 4, 3)
    book.append(1)


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("when", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_pass_that_raises(layer, when, count):
    """In a model of two Mamba layers, the first and the last, around experts and attention."""

    def fail(*_):
        raise KeyboardInterrupt

    model = recurrent_model("nemotron_h")
    book = Book(model)
    book.append(4)
    book.truncate(4, 4, 4)
    book.append(2)
    hook = getattr(model.model.layers[layer], when)(fail)
    with pytest.raises(KeyboardInterrupt):
        book.append(count)
    hook.remove()
    book.tokens = [tokens[:6] for tokens in book.tokens]
    if (layer, when) == (0, "register_forward_pre_hook"):  # nothing has happened
        book.append(2)
        return
    if (layer, when) == (3, "register_forward_hook"):  # all has
        assert book.cache.lengths.tolist() == [6 + count] * 3
    else:
        with pytest.raises(ValueError, match=r"expected the last forward pass .* go back to lengths = \[4, 4, 4\]"):
            book.cache.prepare(1)
        with pytest.raises(ValueError, match=r"expected lengths of which there are recurrent states, as \[4, 4, 0\]"):
            mk.truncate_kv_cache_(book.cache, torch.tensor([*book.cache.lengths[:2], 0]))
    book.truncate(4, 0, 4)
    book.append(3)


def test_states_with_gradient():
    """Of a layer behind the last attention, whose keys have none. The graph is not kept by what is settled."""
    model = recurrent_model("nemotron_h")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.layers[3].mixer.A_log.requires_grad_()
    cache = mk.RaggedKVCache(model.config, BATCH, 8, dtype=torch.float64)
    ids = torch.ones(BATCH, 2, dtype=torch.long)
    model(ids, **cache.prepare(2))
    with pytest.raises(ValueError, match="states: expected tensors without gradient, got requires_grad=True"):
        model(ids, **cache.prepare(2))
    cache.reset()
    model(ids, **cache.prepare(2))
    cache.truncate_(2)
    assert not any(state.requires_grad for layer in cache.states.layers for state in layer.settled.values())


def test_how_much_states_take():
    model = recurrent_model("qwen3_5_text", dtype=torch.float32)
    book = Book(model)
    assert isinstance(book.cache.states, RecurrentStates)
    book.append(1, [0])
    # The last four inputs of 64 channels, and 4 heads of 8 x 8, in float32.
    assert book.cache.states.nbytes == (64 * 4 + 4 * 8 * 8) * 4
    book.truncate(1, 0, 0)
    assert book.cache.states.nbytes == 0  # until the next pass there is no working copy


def test_a_plain_forward_pass_is_refused():
    """Its first layers begin before the cache is asked. What they leave is forgotten."""
    book = Book(recurrent_model("lfm2"))
    with pytest.raises(ValueError, match=r"expected a forward pass with what prepare gives, in a model with recurrent"):
        book.model(torch.ones(BATCH, 2, dtype=torch.long), **{mk.ragged_kv_cache.CACHE_ARGUMENT: book.cache})
    book.append(3)


def test_several_states_in_a_layer():
    """As a model's configuration says how many there are."""
    config = recurrent_model("lfm2").config
    config.number_of_conv_states = 2
    cache = mk.RaggedKVCache(config, 2, 8)
    layer, _ = cache.states.layers[0], cache.prepare(1)
    states = torch.randn(2, 2, 3, 4)
    for number, state in enumerate(states):
        layer.update_conv_state(state, number)
    layer.settle_(None, torch.tensor([True, False]))
    layer.load(torch.tensor([1, 0]))
    for number, state in enumerate(states):
        assert torch.equal(layer.conv_states[number], torch.stack([torch.zeros(3, 4), state[0]]))


@pytest.mark.parametrize("name", ["inkling_text", "inkling2_text", "inkling2_loop_text"])
def test_distances_from_the_end_of_the_cache_are_refused(name):
    """Rows of other lengths would be read wrongly."""
    config = AutoConfig.for_model(name, layer_types=["hybrid"] * 2, num_hidden_layers=2)
    with pytest.raises(ValueError, match=f"got '{name}', which counts distances from the end of the cache"):
        mk.RaggedKVCache(config, BATCH, 8)


def test_older_versions_of_transformers(monkeypatch):
    """Their caches keep states in other ways."""
    config = recurrent_model("lfm2").config
    monkeypatch.delattr(Cache, "get_recurrent_state")
    with pytest.raises(ValueError, match=r"got layer 0 of 'conv': they can be rolled back with transformers 5\.24"):
        mk.RaggedKVCache(config, BATCH, 8)

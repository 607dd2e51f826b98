"""Where the caches do not hold every row at its longest, the same is written, with what room there is."""

import copy
import itertools

import pytest
import torch
from test_synthesis import assert_same

import motab
from motab import memory
from motab.admission import Admission
from motab.speculation import Plan, Speculation
from motab_kernels import RaggedKVCache
from motab_kernels.backend import HAS_LIBRARY

SETTINGS = {
    "max_new_tokens": 150,
    "batch_size": 6,
    "block_size": 24,
    "temperature": 0.7,
    "seed": 5,
    "indices": range(30, 42),
}
LONGEST = 13 + 150 + 24  # a prompt, the budget, a block
POLICIES = [
    motab.MotabPolicy(epsilon0=0.3, theta=0.5, stitch="ab,"),
    motab.MotabPolicy(epsilon0=0.3, theta=0.5, stitch=None, max_interventions=4),
    motab.MotabPolicy(epsilon0=0.1, theta=0.0, backtrack="none", max_interventions=9),
    motab.OnPolicy(),
    motab.TeacherOnly(),
]


@pytest.fixture(autouse=True)
def long_texts(monkeypatch):
    """The tiny models would end after a dozen tokens."""
    monkeypatch.setattr("motab.engine.end_tokens", lambda models, tokenizer: [99])


@pytest.fixture
def waited(monkeypatch):
    """How much each trajectory that had to wait had written."""
    make_room, found = Admission._make_room, []

    def noting(admission):
        before = set(admission.parked)
        make_room(admission)
        found.extend(len(admission.parked[index][0].seen) for index in set(admission.parked) - before)

    monkeypatch.setattr(Admission, "_make_room", noting)
    return found


@pytest.mark.skipif(not HAS_LIBRARY, reason="needs the C++ kernels")
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_the_same_trajectories(student, teacher, tokenizer, prompts, policy, waited, monkeypatch):
    """Some have to wait; pages that no row holds are NaN, and so is what padding was written to."""
    monkeypatch.setattr("motab.writer.PREFILL", 16)
    pair = [copy.deepcopy(model).float() for model in (student, teacher)]
    expected = list(motab.synthesize(*pair, tokenizer, prompts, policy=policy, **SETTINGS))
    assert not waited
    reserve, most = RaggedKVCache.reserve_, []

    def poisoning(cache, lengths):
        reserve(cache, lengths)
        most.append(sum(map(len, cache.pages.of_row)))
        for layer in cache.layers:
            if layer.is_initialized:
                layer.keys[[*cache.pages.free, 7]] = layer.values[[*cache.pages.free, 7]] = torch.nan

    monkeypatch.setattr(RaggedKVCache, "reserve_", poisoning)
    found = list(motab.synthesize(*pair, tokenizer, prompts, policy=policy, **SETTINGS, max_cached_tokens=7 * 64 + 63))
    assert max(waited) > 30
    assert max(most) == 7
    assert max(len(t.token_ids) for t in found) >= 150
    assert_same(found, expected)


def test_the_same_with_a_student_that_drafts(student, teacher, tokenizer, prompts, waited, monkeypatch):
    """All that a teacher writes; it reads again, with the teacher, what had to wait."""
    settings = {**SETTINGS, "policy": motab.TeacherOnly()}
    expected = list(motab.synthesize(None, teacher, tokenizer, prompts, **settings))
    plans = itertools.cycle([Plan(9, speculates=True), Plan(24, speculates=False), Plan(24, speculates=True)])
    monkeypatch.setattr(Speculation, "plan", lambda self, *rows: next(plans))
    found = list(motab.synthesize(student, teacher, tokenizer, prompts, **settings, max_cached_tokens=7 * 64 + 63))
    assert max(waited) > 30
    assert_same(found, expected)


def test_one_row_at_a_time(student, teacher, tokenizer, prompts, waited):
    """The least room: the longest row's own. Nothing has to wait, for nothing runs beside it."""
    least = 64 * 3
    policy = POLICIES[0]
    found = list(
        motab.synthesize(student, teacher, tokenizer, prompts, policy=policy, **SETTINGS, max_cached_tokens=least)
    )
    assert [t.index for t in found] == list(range(30, 30 + len(prompts)))
    assert not waited
    with pytest.raises(ValueError, match=f"max_cached_tokens must be at least {least}, .* {LONGEST} tokens in pages"):
        motab.synthesize(student, teacher, tokenizer, prompts, policy=policy, **SETTINGS, max_cached_tokens=least - 1)


def test_pages_only_where_they_are_needed():
    assert memory.pages_for(None, 4, 100) is None
    assert memory.pages_for(400, 4, 100) is None
    assert memory.pages_for(399, 4, 100) == (6, 64)
    assert memory.pages_for(40_000, 8, 32_768) == (156, 256)


@pytest.mark.skipif(not HAS_LIBRARY, reason="without kernels the model's own attention reads the cache")
def test_bytes_of_the_cache_of_a_model_with_flash_attention(student):
    """Which reads no cache with rows of their own; generation replaces it."""
    model = copy.deepcopy(student).float()
    model.config._attn_implementation = "flash_attention_2"
    assert memory.cache_bytes(model).of_token == 2 * 2 * 2 * 8 * 4
    assert model.config._attn_implementation == "flash_attention_2"


def test_bytes_of_the_cache(student):
    """Keys and values of 2 layers with 2 heads of 8 in float64, as the CPU does not ask for."""
    assert memory.cache_bytes(student).of_token == 2 * 2 * 2 * 8 * 8
    assert memory.tokens_that_fit([student], 8) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert memory.cache_bytes(copy.deepcopy(student).float()).of_token == 2 * 2 * 2 * 8 * 2

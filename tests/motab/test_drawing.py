"""Sampling: random numbers by position, and the right distribution from them."""

import pytest
import torch

from motab.drawing import Sampling, stream_key, uniform


def draws(logits, count, *settings):
    keys = torch.full((count,), stream_key(1, 2, 0))
    return Sampling(*settings).draw(logits.expand(count, -1), uniform(keys, torch.arange(count))).token_ids


def test_uniform_is_uniform_and_keyed():
    keys = torch.tensor([stream_key(0, sample, writer) for sample in range(100) for writer in (0, 1)])
    numbers = uniform(keys[:, None], torch.arange(500)[None])
    assert numbers.unique().numel() == numbers.numel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 50, 0, 1)
    expected = numbers.numel() / 50
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi square, 49 degrees: beyond 110 once in 10^6


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.5, 0.3)])
def test_distribution(temperature, top_p):
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(4))
    logits[0, 3] = float("-inf")
    probabilities = (logits[0].double() / temperature).softmax(-1)
    ordered = sorted(range(9), key=lambda token: -probabilities[token])
    total, nucleus = 0.0, []
    for token in ordered:
        if total < top_p:
            nucleus.append(token)
        total += float(probabilities[token])
    expected = torch.zeros(9, dtype=torch.double)
    expected[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    counts = torch.bincount(draws(logits, 20000, temperature, None, top_p), minlength=9) / 20000
    assert (counts - expected).abs().max() < 0.015
    assert counts[expected == 0].sum() == 0


def test_none_and_0_are_all_tokens():
    logits = torch.randn(1, 50)
    assert torch.equal(draws(logits, 500, 1.0, None, 1.0, None), draws(logits, 500, 1.0, 0, 1.0, 0.0))


@pytest.mark.parametrize("temperature", [-1.0, 1e-38, float("nan"), float("inf")])
def test_temperatures_that_float32_cannot_take(temperature):
    with pytest.raises(ValueError, match=f"temperature: expected 0 .* 1e-30 .* got {temperature}"):
        Sampling(temperature)

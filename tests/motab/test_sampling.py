"""Sampling: the right distribution, the same draw in any batch."""

import pytest
import torch

from motab.sampling import choose, stream_key, uniform


def draws(logits, count, temperature=1.0, top_p=1.0):
    keys = torch.full((count,), stream_key(1, 2, 0))
    return choose(logits.expand(count, -1), uniform(keys, torch.arange(count)), temperature, top_p)


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
    counts = torch.bincount(draws(logits, 20000, temperature, top_p), minlength=9) / 20000
    assert (counts - expected).abs().max() < 0.015
    assert counts[expected == 0].sum() == 0


def test_greedy_takes_the_likeliest():
    logits = torch.randn(6, 9)
    assert torch.equal(choose(logits, torch.zeros(6), 0, 1.0), logits.argmax(-1))


def test_a_row_draws_the_same_in_any_batch():
    logits = torch.randn(8, 50)
    keys = torch.tensor([stream_key(9, row, 0) for row in range(8)])
    positions = torch.arange(8)
    whole = choose(logits, uniform(keys, positions), 0.9, 0.8)
    alone = [choose(logits[i : i + 1], uniform(keys[i : i + 1], positions[i : i + 1]), 0.9, 0.8) for i in range(8)]
    assert torch.equal(whole, torch.cat(alone))

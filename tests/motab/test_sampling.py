"""Sampling: the right distribution, the same draw in any batch."""

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from motab.sampling import Sampling, choose, stream_key, uniform


def draws(logits, count, *settings):
    keys = torch.full((count,), stream_key(1, 2, 0))
    return choose(logits.expand(count, -1), uniform(keys, torch.arange(count)), Sampling(*settings))[0]


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


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 0, 1, 5, 20, 99])
@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, None), (0.9, 0.0), (0.5, 0.02), (1.0, 0.2), (0.95, 1.0)])
def test_as_transformers(temperature, top_k, top_p, min_p):
    """Numbers at even distances draw each token as often as it is likely, after transformers' own processors."""
    count = 4000
    logits = 2 * torch.randn(12, 40, generator=torch.Generator().manual_seed(5))
    if top_p == 1:  # of two that are as likely top_p may take either, where it does not need both
        logits[:, 7] = logits[:, 8:16].amax(-1)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    scores = MinPLogitsWarper(min_p)(None, scores) if min_p is not None else scores
    numbers = (torch.arange(count).double() + 0.5) / count
    for row, expected in zip(logits, scores.double().softmax(-1), strict=True):
        tokens, _ = choose(row.expand(count, -1), numbers, Sampling(temperature, top_k, top_p, min_p))
        share = torch.bincount(tokens, minlength=40) / count
        torch.testing.assert_close(share.double(), expected, rtol=0, atol=1.1 / count)
        assert share[expected == 0].sum() == 0


@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, None), (0.9, None), (0.95, 0.1)])
def test_the_likeliest_of_many(top_p, min_p):
    """The draw is that over the whole vocabulary with the others masked, ties with the k-th included."""
    logits = (3 * torch.randn(200, 500)).round(decimals=1)
    numbers = torch.rand(200).double()
    least = logits.topk(20).values[:, -1:]
    assert ((logits >= least).sum(-1) > 20).any()
    masked = logits.masked_fill(logits < least, float("-inf"))
    expected, _ = choose(masked, numbers, Sampling(0.8, None, top_p, min_p))
    assert torch.equal(choose(logits, numbers, Sampling(0.8, 20, top_p, min_p))[0], expected)


def test_no_more_than_64_ties():
    assert len(set(draws(torch.zeros(1, 500), 3000, 1.0, 20).tolist())) == 84


def test_top_p_takes_no_more_than_it_needs():
    """Of four that are as likely two make up a half, and always the same two."""
    assert set(draws(torch.zeros(1, 4), 200, 1.0, None, 0.5).tolist()) == {0, 1}


def test_top_p_takes_no_more_than_it_needs_of_a_long_row():
    """Where it ends with a piece, and within one."""
    last = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    for top_p in (0.5, 0.375 + 2**-12):
        assert choose(torch.zeros(1, 4096), last, Sampling(1.0, None, top_p))[0] == 4096 * top_p - 1


def excluding(logits):
    """In places: single tokens, whole pieces, and the end."""
    logits[:, ::3], logits[:, 512:1600], logits[:, -700:] = (-torch.inf,) * 3
    return logits


@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-9])
@pytest.mark.parametrize("V", [2048, 2049, 5000, 5120])
def test_long_rows(V, top_p):
    """The first token whose running sum is beyond the number, as a sum of the whole row finds it."""
    rows = 300
    logits = excluding(2 * torch.randn(rows, V))
    edges = [0.0, 5e-324, 0.5, 1 - 2.0**-53]
    numbers = torch.cat([torch.tensor(edges, dtype=torch.float64), torch.rand(rows - len(edges)).double()])
    probabilities = (logits / 0.7).softmax(-1)
    ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    # A share of their sum, which in float32 is not exactly 1.
    needless = before >= top_p * ordered.sum(-1, keepdim=True, dtype=torch.float64)
    kept = torch.empty_like(probabilities).scatter_(-1, places, ordered.masked_fill(needless, 0.0))
    sums = kept.cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True)[:, 0]
    tokens, can_be_drawn = choose(logits, numbers, Sampling(0.7, None, top_p))
    assert torch.equal(tokens, expected)
    assert can_be_drawn.all()
    assert (kept.gather(-1, tokens[:, None]) > 0).all()
    alone = [choose(logits[i : i + 1], numbers[i : i + 1], Sampling(0.7, None, top_p))[0] for i in range(8)]
    assert torch.equal(tokens[:8], torch.cat(alone))


def test_the_number_nearest_1_draws_a_token_with_a_probability():
    """Even where the sum of a piece was rounded up, and its running sum ends below it."""
    logits = excluding(5 * torch.randn(2000, 5000))
    tokens, _ = choose(logits, torch.full((2000,), 1 - 2.0**-53, dtype=torch.float64), Sampling(1.0))
    assert (logits.gather(-1, tokens[:, None]) > -torch.inf).all()


def test_no_running_sum_of_a_long_row(monkeypatch):
    """It would take memory for the logits in float64, and on a GPU longer than all else in a draw."""
    cumsum, sizes = torch.Tensor.cumsum, []

    def noting(x, *args, **keywords):
        sizes.append(x.shape[-1])
        return cumsum(x, *args, **keywords)

    monkeypatch.setattr(torch.Tensor, "cumsum", noting)
    choose(torch.randn(2, 20000), torch.rand(2).double(), Sampling(1.0, None, 0.9))
    assert sizes
    assert max(sizes) <= 512


def test_greedy_takes_the_likeliest():
    logits = torch.randn(6, 9)
    assert torch.equal(choose(logits, torch.zeros(6), Sampling(0))[0], logits.argmax(-1))


def test_a_row_draws_the_same_in_any_batch():
    logits = torch.randn(8, 50)
    keys = torch.tensor([stream_key(9, row, 0) for row in range(8)])
    positions = torch.arange(8)
    sampling, numbers = Sampling(0.9, 30, 0.8, 0.1), uniform(keys, positions)
    whole, _ = choose(logits, numbers, sampling)
    alone = [choose(logits[i : i + 1], numbers[i : i + 1], sampling)[0] for i in range(8)]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0), Sampling(0.7, 2, 0.5, 0.1)])
def test_what_cannot_be_drawn_from(sampling):
    nan, inf = float("nan"), float("inf")
    rows = [[1.0, 2.0, -inf], [nan, 1.0, 2.0], [1.0, 2.0, nan], [-inf, -inf, -inf], [1.0, inf, 0.0], [-9e9, 3.0, -2e9]]
    for dtype, more in ((torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 4000)):
        logits = torch.nn.functional.pad(torch.tensor(rows, dtype=dtype), (0, more), value=-inf)
        tokens, can_be_drawn = choose(logits, torch.full((6,), 0.5).double(), sampling)
        assert can_be_drawn.tolist() == [True, False, False, False, False, True]
        assert tokens.min() >= 0
        assert tokens.max() < 3 + more


@pytest.mark.parametrize("temperature", [-1.0, 1e-38, float("nan"), float("inf")])
def test_temperatures_that_float32_cannot_take(temperature):
    with pytest.raises(ValueError, match=f"temperature must be a finite number .* 1e-30, .* got {temperature}"):
        Sampling(temperature)


def test_the_least_temperature_is_greedy():
    logits = 1e7 * torch.randn(6, 9)
    tokens, can_be_drawn = choose(logits, torch.rand(6).double(), Sampling(1e-30))
    assert can_be_drawn.all()
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("settings", [(0.7,), (0.7, None, 0.9, 0.01), (0.7, 20), (0.0,)])
def test_a_gpu_draws_what_the_cpu_does(settings):
    """But for rounding; and the host does not wait."""
    logits = excluding(3 * torch.randn(64, 151669)).bfloat16()
    numbers = torch.rand(64).double()
    numbers[0] = 1 - 2.0**-53
    on_gpu = logits.cuda(), numbers.cuda()
    for attempt in range(2):
        if attempt == 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            tokens, can_be_drawn = choose(*on_gpu, Sampling(*settings))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert can_be_drawn.all()
    assert (logits.gather(-1, tokens.cpu()[:, None]) > -torch.inf).all()
    assert (tokens.cpu() == choose(logits, numbers, Sampling(*settings))[0]).float().mean() > 0.9

"""Inputs of `sample_from_logits`, and its definition in float64."""

import math
import random

import torch

SETTINGS = {
    "all": {},
    "temperature": {"temperature": 0.3},
    "top-k": {"top_k": 20, "temperature": 1.7},
    "a large top-k": {"top_k": 300, "temperature": 5.0},
    "top-p": {"top_p": 0.9},
    "a high top-p": {"top_p": 1 - 1e-6, "temperature": 0.6},
    "a low top-p": {"top_p": 1e-9},
    "min-p": {"min_p": 0.05},
    "top-k and top-p": {"top_k": 50, "top_p": 0.8, "temperature": 0.7},
    "every filter": {"top_k": 30, "top_p": 0.95, "min_p": 0.02},
}
#: Of which `random_settings` chooses for each row.
CHOICES = {
    "temperature": (0.0, 0.3, 1.0, 4.0),
    "top_k": (0, 1, 20, 300, 2**31 - 1),
    "top_p": (1.0, 0.9, 0.5, 1 - 1e-6, 1e-9),
    "min_p": (0.0, 0.05, 1.0),
}
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
EDGES = (0.0, 1 - 2.0**-53, 5e-324)
ROUNDING = 5e-6


def random_case(*shape, dtype=torch.float32, scale=3.0, seed=0):
    """Logits, of which a share is excluded, and numbers, the edges among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator)
    if shape[-1] > 4:
        logits[..., 0::5], logits[..., shape[-1] // 2 : shape[-1] * 5 // 8] = -math.inf, -math.inf
    uniforms = torch.rand(shape[:-1], dtype=torch.float64, generator=generator)
    edges = torch.tensor(EDGES[: uniforms.numel()], dtype=torch.float64)
    uniforms.view(-1)[: len(edges)] = edges
    return logits.to(dtype), uniforms


def random_settings(B, seed=0):
    """Tensors (B,) of any dtype and with a stride: greedy rows beside filtered ones; the last row keeps all tokens."""
    chosen = random.Random(seed)
    settings = {}
    for name, choices in CHOICES.items():
        dtype = chosen.choice((torch.int32, torch.int64) if name == "top_k" else (torch.float32, torch.float64))
        values = [chosen.choice(choices) for _ in range(2 * B - 2)] + [NEUTRAL[name], -7]
        settings[name] = torch.tensor(values, dtype=dtype)[::2]
    return settings


def of_row(settings, b):
    """Those of one row, as numbers; a tensor is 0-d or (B,)."""
    return {name: x[b if x.dim() else ()].item() if isinstance(x, torch.Tensor) else x for name, x in settings.items()}


def kept(row, temperature, top_k, top_p, min_p):
    """The weights of (V,) logits after the filters, which sum to 1."""
    if temperature == 0:
        return (torch.arange(len(row)) == row.argmax()).double()
    order = row.argsort(descending=True)
    if top_k:
        row = row.where(row >= row[order[min(top_k, len(row)) - 1]], -math.inf)
    probabilities = (row / temperature).softmax(0)
    if top_p < 1:
        enough = (probabilities[order].cumsum(0) >= top_p).nonzero()
        least = row[order[enough[0] if len(enough) else -1]]
        probabilities = probabilities.where(row >= least, 0)
    probabilities = probabilities.where(probabilities >= min_p * probabilities.max(), 0)
    return probabilities / probabilities.sum()


def assert_matches_definition(samples, logits, uniforms, **settings):
    """Each token is one in whose share of [0, 1) its number lies, where numbers and limits may move by rounding."""
    assert samples.token_ids.dtype == torch.int64
    assert samples.token_ids.shape == samples.valid.shape == uniforms.shape
    assert samples.valid.all()
    V = logits.shape[-1]
    assert ((samples.token_ids >= 0) & (samples.token_ids < V)).all()
    for b in range(len(logits)):
        assert_row_matches(samples.token_ids[b], logits[b], uniforms[b], **(NEUTRAL | of_row(settings, b)))


def assert_row_matches(tokens, logits, uniforms, temperature, top_k, top_p, min_p):
    rows = logits.double().reshape(-1, logits.shape[-1])
    limits = {(top_p + x * ROUNDING, min_p * (1 + y * 1e-5)) for x in (-1, 0, 1) for y in (-1, 0, 1)}
    if top_p == 1 or top_p < ROUNDING:
        limits = {(top_p, y) for _, y in limits}
    for row, u, token in zip(rows, uniforms.flatten().tolist(), tokens.flatten().tolist(), strict=True):
        assert any(holds(kept(row, temperature, top_k, *limit), u, token) for limit in limits), (u, token)


def holds(weights, u, token):
    end = float(weights[: token + 1].sum())
    return weights[token] > 0 and end > u - ROUNDING and end - weights[token] <= u + ROUNDING

"""What the tests of `motab_kernels.interop` compare with, and the inputs, for every peer."""

import sys
import types
import warnings

import pytest
import torch
from divergence_cases import logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS = [0.0, 0.1, 0.5, 1.0]
N, V, H, H_T = 6, 37, 5, 7  # a teacher of another width

every_beta = pytest.mark.parametrize("beta", BETAS)


def peer(name):
    """A peer's module, or skip: asked for last, after the formula. What it warns of at import is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def pair(*shape, seed=0, **keywords):
    return tuple(x.to(DEVICE) for x in logits(*shape, seed=seed, **keywords))


def heads(seed=0, n=N, dtype=torch.float32):
    """Hidden states and weight of a student, then of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, H), (V, H), (n, H_T), (V, H_T)
    return tuple(torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)


def some_labels(n=N):
    """Two of them ignored."""
    labels = torch.arange(n, device=DEVICE) % V
    labels[1::3] = -100
    return labels


def jsd(student, teacher, beta, tau=1.0):
    """Each position's, in float64: at the ends the KLs themselves, not the limits, which are 0."""
    log_q, log_p = ((x.double() / tau).log_softmax(-1) for x in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (q * (log_q - log_p)).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def run(loss, *leaves):
    """A loss and its gradients by tensors that it is called with."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def assert_same(got, expected, rtol=2e-5, atol=1e-6):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=atol)


def fake_module(monkeypatch, name):
    """An empty module under this name, and packages above it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    return sys.modules[name]

"""Heads for `fused_linear_divergence`, the equivalent expression in float64, and the backends."""

import pytest
import torch
from divergence_cases import BACKENDS, DEVICE

import motab_kernels as mk


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "triton":
        from motab_kernels.gpu import divergence as gpu

        monkeypatch.setattr(gpu, "settings_for", lambda device: gpu.Settings(lanes=8, tiles=2, rows=4))
    return request.param


def heads(N=7, H=12, H_teacher=20, V=100, V_teacher=110, dtype=torch.float64, seed=0):
    """Hidden states, weight and bias of both sides; logits a few nats wide."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = random(N, H), random(V, H) * 0.6, random(V) * 0.3
    teacher = random(N, H_teacher), random(V_teacher, H_teacher) * 0.5, random(V_teacher) * 0.3
    return [x.to(dtype).to(DEVICE) for x in student], [x.to(dtype).to(DEVICE) for x in teacher]


def fused(student, teacher, **keywords):
    leaves = [x.clone().requires_grad_() for x in student]
    loss = mk.fused_linear_divergence(
        *leaves[:2], *teacher[:2], student_bias=leaves[2], teacher_bias=teacher[2], **keywords
    )
    return loss, leaves


def materialised(student, teacher, scales=(1.0, 1.0), softcaps=(None, None), **keywords):
    """The equivalent expression, in float64."""
    leaves = [x.double().requires_grad_() for x in student]
    logits = []
    for (hidden, weight, bias), scale, cap in zip(
        (leaves, [x.double() for x in teacher]), scales, softcaps, strict=True
    ):
        x = scale * (hidden @ weight.T + bias)
        logits.append(x if cap is None else cap * torch.tanh(x / cap))
    return mk.divergence_loss(*logits, **keywords, backend="torch"), leaves


def assert_same(found, expected, upstream=None, rtol=1e-5, atol=1e-6):
    (loss, leaves), (expected_loss, expected_leaves) = found, expected
    torch.testing.assert_close(loss.double(), expected_loss, rtol=rtol, atol=atol)
    loss.backward(None if upstream is None else upstream.to(loss.dtype))
    expected_loss.backward(upstream)
    for x, y in zip(leaves, expected_leaves, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=rtol, atol=atol)

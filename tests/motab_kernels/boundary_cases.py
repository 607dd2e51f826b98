"""The definition that `fused_kl_boundary` is tested against, the inputs, and the backends without a GPU."""

import math

import pytest
import torch

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY
from motab_kernels.tensors import KERNEL_DTYPES

STATISTICS = mk.BoundaryOutput._fields[:6]
INF, NAN = math.inf, math.nan


def definition(student, teacher, token, tau=1.0):
    """Statistics of one position from two rows of logits, in float64, a sum over the columns that count."""
    s, t = student.double() / tau, teacher.double() / tau
    q, p = ((x - x.max()).exp() / (x - x.max()).exp().sum() for x in (s, t))
    log_q, log_p = (x - x.max() - (x - x.max()).exp().sum().log() for x in (s, t))

    def expect(weight, value):
        return (weight[weight > 0] * value[weight > 0]).sum().item()

    return {
        "forward_kl": expect(p, log_p - log_q),
        "reverse_kl": expect(q, log_q - log_p),
        "student_logprob": log_q[token].item(),
        "teacher_logprob": log_p[token].item(),
        "student_entropy": expect(q, -log_q),
        "teacher_entropy": expect(p, -log_p),
        "teacher_rank": int((teacher > teacher[token]).sum()),
        "teacher_argmax": int(teacher.argmax()),
    }


def eager(student, teacher, dtype):
    """KLs and entropies as a training loop would write them, in `dtype`."""
    log_q, log_p = student.to(dtype).log_softmax(-1), teacher.to(dtype).log_softmax(-1)
    return {
        "forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "student_entropy": -(log_q.exp() * log_q).sum(-1),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
    }


def decide(scores, thresholds, high_is_safe=True):
    """(t, t*) of one row's finished steps by the definition; None without a breach."""
    for t, (score, threshold) in enumerate(zip(scores, thresholds, strict=True)):
        if not (score >= threshold if high_is_safe else score <= threshold):
            safety = [x if high_is_safe else -x for x in scores]
            falls = [safety[k] - safety[k - 1] for k in range(1, t + 1)]
            falls = [-INF if math.isnan(x) else x for x in falls]
            return t, (1 + falls.index(min(falls)) if falls else 0)
    return None


def random_inputs(B, T, V, dtype=torch.float32, seed=0, scale=3.0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(B, T, V, generator=generator) * scale
    student = teacher + noise * torch.randn(B, T, V, generator=generator)
    tokens = torch.randint(V, (B, T), generator=generator)
    return student.to(dtype), teacher.to(dtype), tokens


def poisoned_output(shape):
    """Buffers whose every element is wrong until it is written."""
    float_, int_ = torch.full(shape, NAN), torch.full(shape, -99, dtype=torch.int64)
    parts = [float_.clone() for _ in range(6)] + [int_.int(), int_, float_.clone(), float_.clone()]
    return mk.BoundaryOutput(*parts, torch.ones(shape, dtype=torch.bool))


def assert_equal(actual, expected, names=mk.BoundaryOutput._fields):
    for name in names:
        a, b = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_matches_definition(out, student, teacher, tokens, tau=None, atol=1e-5):
    for b, i in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist():
        expected = definition(student[b, i], teacher[b, i], tokens[b, i], 1.0 if tau is None else tau[b])
        for name, value in expected.items():
            got = getattr(out, name)[b, i].item()
            assert got == pytest.approx(value, abs=atol, rel=1e-6), f"{name} at {b, i}"


BOUNDARIES = {
    "entropy": mk.EntropyBoundary(0.3, 0.05),
    "entropy per row": mk.EntropyBoundary(torch.tensor([0.5, 0.3, 0.2, 0.1]), torch.tensor(0.05)),
    "entropy top-k": mk.EntropyBoundary(0.3, 0.3, entropy_top_k=5),
    "value": mk.FixedBoundary(0.15),
    "value_ratio": mk.FixedBoundary(0.9, score="value_ratio"),
    "forward_kl": mk.FixedBoundary(0.6, score="forward_kl"),
    "reverse_kl": mk.FixedBoundary(0.5, score="reverse_kl"),
    "teacher_rank": mk.FixedBoundary(6, score="teacher_rank"),
    "moving average": mk.MovingAverageBoundary(1.7, window=3),
}


def stepwise(B, T, seed):
    student, teacher, _ = random_inputs(B, T, 20, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(student.softmax(-1).flatten(0, 1), 1, generator=generator).view(B, T)
    step_ends = torch.rand(B, T, generator=generator) < 0.4
    return student, teacher, tokens, step_ends


def with_values(values, V=8):
    """Logits whose token 0 has the given teacher probabilities, (T,) to (1, T, V) twice, and the tokens."""
    p = torch.tensor(values, dtype=torch.float64)[None, :, None]
    teacher = torch.cat((p, ((1 - p) / (V - 1)).expand(-1, -1, V - 1)), -1).log()
    return torch.zeros_like(teacher), teacher, torch.zeros(1, len(values), dtype=torch.int64)


needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="needs the C++ kernels")


@pytest.fixture(autouse=True, params=["torch", pytest.param("cpu", marks=needs_library)])
def backend(request, monkeypatch):
    """What a call runs on that asks for no backend, in the files that name this; float64 is for "torch" alone."""
    op = mk.fused_kl_boundary

    def on_backend(*arguments, **options):
        if all(getattr(x, "dtype", None) in KERNEL_DTYPES for x in arguments[:2]) and arguments:
            options.setdefault("backend", request.param)
        return op(*arguments, **options)

    monkeypatch.setattr(mk, "fused_kl_boundary", on_backend)
    return request.param

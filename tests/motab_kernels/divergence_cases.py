"""The definition that the divergence losses are tested against, the inputs, and the backends."""

import pytest
import torch

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY, HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", *(["cpu"] if HAS_LIBRARY else []), *(["triton"] if HAS_TRITON else [])]
#: Each kind with its default parameters, and a mixture that leans the other way.
KINDS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.5},
    "jsd leaning": {"beta": 0.1},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.3},
    "tvd": {},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def options(kind):
    return {"divergence": kind.split()[0], **KINDS[kind]}


def definition(student, teacher, kind, tau=1.0):
    """(R, V) logits without -inf to each row's divergence (R,), in float64, differentiable."""
    divergence, parameters = kind.split()[0], KINDS[kind]
    q, p = (student.double() / tau).softmax(-1), (teacher.double() / tau).softmax(-1)

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if divergence == "forward_kl":
        return kl(p, q)
    if divergence == "reverse_kl":
        return kl(q, p)
    if divergence == "jsd":
        beta = parameters["beta"]
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if divergence == "skew_forward_kl":
        return kl(p, parameters["alpha"] * p + (1 - parameters["alpha"]) * q)
    if divergence == "skew_reverse_kl":
        return kl(q, (1 - parameters["alpha"]) * p + parameters["alpha"] * q)
    return 0.5 * (p - q).abs().sum(-1)


def expected(student, teacher, kind, tau=1.0):
    """Each row's divergence and the gradient of their sum, in float64."""
    student = student.double().detach().requires_grad_()
    losses = definition(student, teacher, kind, tau)
    return losses.detach(), torch.autograd.grad(losses.sum(), student)[0]


def logits(*shape, dtype=torch.float32, seed=0, scale=3.0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(*shape, generator=generator) * scale
    student = teacher + noise * torch.randn(*shape, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def without_ties(student, teacher, tau=1.0):
    """Exclude the columns on which p and q agree to rounding: total variation's gradient jumps there, by 2 q."""
    log_q, log_p = ((x.double() / tau).log_softmax(-1) for x in (student, teacher))
    tie = (log_q - log_p).abs() < 1e-5
    return student.masked_fill(tie, -torch.inf), teacher.masked_fill(tie, -torch.inf)


def relative_error(x, y):
    """Of a whole gradient, by its norm."""
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Triton with 4 lanes of 16 columns a tile, two tiles a split."""
    if request.param == "triton":
        set_lanes(monkeypatch, 4)
    return request.param


def set_lanes(monkeypatch, lanes):
    from motab_kernels.gpu import divergence as gpu

    warps = 4 if lanes >= 128 else 1
    monkeypatch.setattr(gpu, "settings_for", lambda device: gpu.Settings(lanes=lanes, tiles=2, num_warps=warps, rows=4))


def run(student, teacher, kind, **keywords):
    """Each position's loss and the gradient of their sum."""
    student = student.to(DEVICE, copy=True).requires_grad_()
    keywords = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
    loss = mk.divergence_loss(student, teacher.to(DEVICE), **options(kind), reduction="none", **keywords)
    loss.backward(torch.ones_like(loss))
    return loss.detach().cpu(), student.grad.cpu()

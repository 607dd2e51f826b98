"""Reductions, masks, weights and the other arguments of `divergence_loss`, and what it refuses, on every backend."""

import math

import divergence_cases
import numpy as np
import pytest
import torch
from divergence_cases import DEVICE, definition, every_kind, expected, logits, options, run

import motab_kernels as mk

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
backend = divergence_cases.backend


@every_kind
def test_options_together(backend, kind):
    """Padded rows, vocabularies of different size, a temperature a row, a mask over NaN, weights, an upstream."""
    generator = torch.Generator().manual_seed(5)
    B, T, V = 3, 5, 90
    student, teacher = logits(B, T, V, seed=5)
    wide_student = torch.full((B, T + 2, V + 17), NAN)
    wide_teacher = torch.full((B, T + 1, V + 5), NAN)
    wide_student[:, :T, :V], wide_teacher[:, 1:, :V] = student, teacher
    mask = torch.rand(B, T, generator=generator) < 0.7
    wide_student[:, :T][~mask] = NAN
    weights, upstream = torch.rand(B, T, generator=generator), torch.randn(B, T, generator=generator)
    tau = torch.tensor([0.7, 1.0, 2.5])

    leaf = wide_student.clone().to(DEVICE).requires_grad_()
    loss = mk.divergence_loss(
        leaf[:, :T],
        wide_teacher.to(DEVICE)[:, 1:],
        **options(kind),
        reduction="none",
        temperature=tau.to(DEVICE),
        mask=mask.to(DEVICE),
        weights=weights.to(DEVICE),
        vocab_size=V,
        backend=backend,
    )
    loss.backward(upstream.to(DEVICE))
    reference = student.double().requires_grad_()
    rows = definition(reference.flatten(0, 1), teacher.flatten(0, 1), kind, tau.repeat_interleave(T)[:, None])
    rows = (rows.view(B, T) * weights).masked_fill(~mask, 0)
    rows.backward(upstream.double())
    torch.testing.assert_close(loss.detach().cpu().double(), rows.detach(), rtol=5e-6, atol=1e-6)
    gradient = leaf.grad.cpu().double()
    torch.testing.assert_close(gradient[:, :T, :V], reference.grad, rtol=1e-5, atol=5e-7)
    gradient[:, :T, :V] = 0
    assert (gradient == 0).all()


def test_reductions(backend):
    student, teacher = logits(3, 4, 20, seed=11)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    rows = mk.divergence_loss(student, teacher, mask=mask, reduction="none", backend="torch")

    def reduced(**keywords):
        device = {"mask": mask.to(DEVICE), "backend": backend}
        return mk.divergence_loss(student.to(DEVICE), teacher.to(DEVICE), **device, **keywords).cpu()

    assert rows.shape == (3, 4)
    torch.testing.assert_close(reduced(reduction="sum"), rows.sum())
    torch.testing.assert_close(reduced(), rows.sum() / 5)
    torch.testing.assert_close(reduced(reduction="batchmean"), rows.sum() / 3)
    torch.testing.assert_close(reduced(num_items=40), rows.sum() / 40)
    torch.testing.assert_close(reduced(num_items=torch.tensor(40)), rows.sum() / 40)
    torch.testing.assert_close(reduced(num_items=np.int64(40)), rows.sum() / 40)
    torch.testing.assert_close(reduced(num_items=torch.tensor(2.5).double()), rows.sum() / 2.5)  # in float32
    masked = {"mask": torch.zeros_like(mask).to(DEVICE), "num_items": torch.tensor(0), "backend": backend}
    assert mk.divergence_loss(student.to(DEVICE), teacher.to(DEVICE), **masked) == 0


def test_expanded_mask_and_upstream(backend):
    """Tensors with strides of 0, as the backward pass of a sum makes them."""
    student, teacher = logits(2, 3, 20, seed=12)
    mask = torch.tensor([True, False, True])
    leaf = student.to(DEVICE, copy=True).requires_grad_()
    mk.divergence_loss(leaf, teacher.to(DEVICE), mask=mask.to(DEVICE).expand(2, 3), backend=backend).backward()
    _, gradient = expected(student.flatten(0, 1), teacher.flatten(0, 1), "forward_kl")
    gradient = gradient.view(2, 3, 20) * mask[None, :, None] / 4
    torch.testing.assert_close(leaf.grad.cpu().double(), gradient, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_to_the_batch(backend):
    student, teacher = (x.to(DEVICE) for x in logits(4, 3, 20, seed=12))
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    whole = mk.divergence_loss(student, teacher, mask=mask, backend=backend)
    parts = [
        mk.divergence_loss(student[i], teacher[i], mask=mask[i], num_items=mask.sum(), backend=backend)
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0, 3, 9)])
def test_empty_batch(backend, shape):
    student = torch.zeros(shape, device=DEVICE, requires_grad=True)
    for reduction in ("batchmean", "mean"):
        loss = mk.divergence_loss(student, torch.zeros(shape, device=DEVICE), reduction=reduction, backend=backend)
        loss.backward()
        assert loss == 0
    assert student.grad.shape == shape


@every_kind
def test_a_mask_of_no_tokens(backend, kind):
    student = torch.full((2, 9), NAN, device=DEVICE, requires_grad=True)
    mask = torch.zeros(2, dtype=torch.bool, device=DEVICE)
    loss = mk.divergence_loss(student, student.detach(), **options(kind), mask=mask, backend=backend)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


@every_kind
def test_weights_of_one_change_no_gradient(backend, kind):
    """Where both sides nearly agree the loss rounds to 0, and its gradient does not."""
    student, teacher = (x.to(DEVICE) for x in logits(5, 200, seed=16, noise=1e-4))
    gradients = []
    for weights in (None, torch.ones(5, device=DEVICE)):
        leaf = student.clone().requires_grad_()
        mk.divergence_loss(leaf, teacher, **options(kind), weights=weights, backend=backend).backward()
        gradients.append(leaf.grad)
    assert (gradients[0].abs().amax(-1) > 0).all()
    assert torch.equal(*gradients)


@every_kind
def test_weights_at_masked_positions_do_not_count(backend, kind):
    student, teacher = (x.to(DEVICE) for x in logits(3, 50, seed=17))
    mask, weights = torch.tensor([True, False, True]), torch.tensor([2.0, NAN, 0.0])
    leaf = student.clone().requires_grad_()
    loss = mk.divergence_loss(
        leaf, teacher, **options(kind), mask=mask.to(DEVICE), weights=weights.to(DEVICE), backend=backend
    )
    loss.backward()
    _, gradient = run(student[:1], teacher[:1], kind, backend=backend)
    torch.testing.assert_close(leaf.grad[:1].cpu(), gradient)  # twice, over two positions
    assert (leaf.grad[1:] == 0).all()


def test_check_finite(backend):
    student, teacher = logits(2, 3, 10, seed=18)
    teacher[1, 1, 4] = NAN
    student, teacher = student.to(DEVICE).requires_grad_(), teacher.to(DEVICE)
    loss = mk.divergence_loss(student, teacher, check_finite=True, backend=backend)
    with pytest.raises(ValueError, match="1 of 6 positions with NaN or inf, the first 4"):
        loss.backward()


def test_the_teacher_gets_no_gradient_in_silence():
    student, teacher = logits(2, 10)
    with pytest.raises(ValueError, match=r"teacher_logits: expected a tensor without gradient.*torch\.no_grad"):
        mk.divergence_loss(student, teacher.requires_grad_())
    with torch.no_grad():
        assert mk.divergence_loss(student, teacher).isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, r"divergence: expected one of forward_kl, .*tvd, got 'kl'"),
        ({"divergence": "jsd", "beta": 1.5}, "beta: expected 0 to 1, got 1.5"),
        ({"divergence": "jsd", "beta": -0.5}, "beta: expected 0 to 1, got -0.5"),
        ({"alpha": 1.0}, "alpha: expected at least 0 and below 1, got 1.0"),
        ({"alpha": -0.1}, "alpha: expected at least 0 and below 1, got -0.1"),
        ({"temperature": 0.0}, r"temperature: expected a finite number from 1e-30 to 1e\+30, got 0.0"),
        ({"divergence": "jsd", "beta": "a"}, "beta: expected a finite number, got 'a'"),
        ({"alpha": None}, "alpha: expected a finite number, got None"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature: expected finite values from 1e-30 to 1e\+30"),
        ({"temperature": torch.tensor(2.0, requires_grad=True)}, "temperature: expected a tensor without gradient"),
        ({"temperature": 1e-40}, "temperature: expected .* from 1e-30 to 1e.30, got 1e-40"),
        ({"temperature": torch.ones(3)}, r"0-d or \(2,\), on cpu, got shape \(3,\)"),
        ({"reduction": "avg"}, "reduction: expected one of none, sum, mean, batchmean, got 'avg'"),
        ({"reduction": "sum", "num_items": 3}, 'num_items: expected None with reduction "sum"'),
        ({"num_items": 0}, r"num_items: expected a finite number from 1e-30 to 1e\+30, got 0"),
        ({"num_items": INF}, r"num_items: expected a finite number from 1e-30 to 1e\+30, got inf"),
        ({"num_items": True}, "num_items: expected a number or a tensor, got bool"),
        ({"num_items": torch.tensor(-2)}, "num_items: expected a number >= 0, got -2"),
        ({"num_items": torch.tensor(True)}, "num_items: .* or a 0-d tensor of one, got torch.bool"),
        ({"num_items": torch.tensor(1j)}, "num_items: .* or a 0-d tensor of one, got torch.complex64"),
        ({"num_items": torch.ones(2)}, r"num_items: .* a 0-d tensor of one, got torch.float32 of shape \(2,\)"),
        ({"mask": torch.ones(2)}, r"mask: expected bool of shape \(2,\) on cpu, got torch.float32"),
        ({"mask": torch.ones(2, device="meta").bool()}, r"mask: expected bool of shape \(2,\) on cpu, got .* on meta"),
        ({"weights": torch.ones(3)}, r"weights: expected floating-point of shape \(2,\).*shape \(3,\)"),
        ({"weights": torch.ones(2, requires_grad=True)}, "weights: expected a tensor without gradient"),
        ({"num_items": torch.tensor(2.0, requires_grad=True)}, "num_items: expected a tensor without gradient"),
        ({"vocab_size": 0}, "vocab_size: expected an integer >= 1, got 0"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"student_logits": torch.ones(2, 10).int()}, "student_logits: expected float32.*got torch.int32"),
        ({"student_logits": torch.ones(10)}, r"student_logits: expected shape \(B, V\) or \(B, T, V\), got \(10,\)"),
        (
            {"student_logits": torch.ones(2, 10).to_sparse()},
            "student_logits: expected a dense tensor, got torch.sparse",
        ),
        ({"teacher_logits": {"logits": torch.ones(2, 10)}}, "teacher_logits: expected a tensor, got dict"),
        ({"student_logits": [1.0]}, "student_logits: expected a tensor, got list"),
        ({"mask": [True, False]}, "mask: expected a tensor, got list"),
        ({"teacher_logits": torch.ones(3, 10)}, r"teacher_logits: expected .*\(2, 'V'\).*got \(3, 10\)"),
        ({"teacher_logits": torch.ones(2, 10, device="meta")}, "teacher_logits: expected .* on cpu, got .* on meta"),
        ({"teacher_logits": torch.ones(2, 0)}, "expected a shared vocabulary, got 10 and 0 columns"),
    ],
)
def test_bad_input(change, message):
    student, teacher = logits(2, 10)
    arguments = {"student_logits": student, "teacher_logits": teacher} | change
    with pytest.raises(ValueError, match=message):
        mk.divergence_loss(arguments.pop("student_logits"), arguments.pop("teacher_logits"), **arguments)

"""`divergence_loss` as an op of torch: what autograd saves, writes over and refuses, compiled, in other modes."""

import math
import os

import divergence_cases
import pytest
import torch
from divergence_cases import (
    DEVICE,
    every_kind,
    expected,
    logits,
    options,
    run,
    set_lanes,
)

import motab_kernels as mk
from motab_kernels.divergence import divergence_backward_op, divergence_op

NAN = math.nan
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
backend = divergence_cases.backend


@every_kind
def test_inplace_backward(backend, kind, monkeypatch):
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter copies each argument, so that no two are one tensor")
    if backend == "triton":
        set_lanes(monkeypatch, 128)  # one a thread: a thread must not read what another has written over
    student, teacher = logits(3, 2, 5000, dtype=torch.bfloat16, seed=13)
    _, gradient = run(student, teacher, kind, backend=backend)
    leaf = student.to(DEVICE, copy=True).requires_grad_()
    head = leaf * 1  # as a language-model head: the graph does not need its output again
    loss = mk.divergence_loss(
        head, teacher.to(DEVICE), **options(kind), reduction="sum", inplace_backward=True, backend=backend
    )
    loss.backward(retain_graph=True)
    assert torch.equal(head.detach().cpu(), gradient)
    assert torch.equal(leaf.grad.cpu(), gradient)
    with pytest.raises(ValueError, match="expected one backward pass with inplace_backward"):
        loss.backward()  # the logits are gone, and no second gradient can be wrong in silence


def test_inplace_backward_leaves_logits_that_the_teacher_s_overlap(backend):
    """A target network's logits as shifted views of the student's own."""
    line = logits(2, 6, 40, seed=19)[0].to(DEVICE)
    gradients = []
    for inplace in (False, True):
        leaf = line.clone().requires_grad_()
        head = leaf * 1
        mk.divergence_loss(head[:, 1:], head.detach()[:, :-1], inplace_backward=inplace, backend=backend).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_was_made_in_inference_mode(backend, reduction):
    student, teacher = (x.to(DEVICE) for x in logits(4, 3, 40, seed=20))
    mask, weights = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(20)).to(DEVICE)
    with torch.inference_mode():
        made = [torch.stack((torch.zeros_like(x), x), 1)[:, 1] for x in (teacher, mask > 0.2, weights)]
    results = []
    for other, keep, worth in ((teacher, mask > 0.2, weights), made):
        leaf = student.clone().requires_grad_()
        loss = mk.divergence_loss(leaf, other, mask=keep, weights=worth, reduction=reduction, backend=backend)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_inplace_backward_leaves_logits_that_share_memory(backend):
    """Rows of an unfolded tensor: one's gradient would be written over another's."""
    generator = torch.Generator().manual_seed(18)
    line, teacher = torch.randn(60, generator=generator).to(DEVICE), torch.randn(3, 50, generator=generator).to(DEVICE)
    gradients = []
    for inplace in (False, True):
        leaf = line.clone().requires_grad_()
        logits = (leaf * 1).unfold(0, 50, 5)
        mk.divergence_loss(logits, teacher, divergence="jsd", inplace_backward=inplace, backend=backend).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@every_kind
def test_saves_24_bytes_a_position_beyond_the_logits(backend, kind):
    student, teacher = logits(8, 100, seed=14)
    student, teacher = student.to(DEVICE).requires_grad_(), teacher.to(DEVICE)
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mk.divergence_loss(student, teacher, **options(kind), backend=backend)
    inputs = {student.data_ptr(), teacher.data_ptr()}
    assert sum(x.nbytes for x in saved if x.data_ptr() not in inputs) == 24 * 8


@every_kind
@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_gradcheck(kind, tau):
    student, teacher = logits(3, 6, dtype=torch.float64, seed=15)
    mask = torch.tensor([True, False, True])

    def loss(x):
        return mk.divergence_loss(x, teacher, **options(kind), temperature=tau, mask=mask, backend="torch")

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_registered(kind):
    student, teacher = logits(2, 3, 10, seed=16)
    mask = torch.tensor([[True, False, True]] * 2)
    tau = torch.tensor(1.5)
    arguments = (student.requires_grad_(), teacher, mask, tau, kind, 0.5, 9, False, False, "torch")
    torch.library.opcheck(divergence_op, arguments)
    saved = divergence_op(*arguments)[1].detach()
    backward = (torch.ones(2, 3), student.detach(), teacher, mask, tau, saved, kind, 0.5, 9, True, "torch")
    torch.library.opcheck(divergence_backward_op, backward)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph():
    student, teacher = logits(2, 3, 10, seed=17)
    mask = torch.tensor([[True, False, True]] * 2)

    def loss(x, temperature, teacher=teacher):
        return mk.divergence_loss(
            x * 2,
            teacher,
            divergence="jsd",
            temperature=temperature,
            mask=mask,
            inplace_backward=True,
            check_finite=True,
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperature in (1.3, 2.0, 0.7):  # from the second on a number that varies
        results = []
        for call in (loss, compiled):
            x = student.clone().requires_grad_()
            value = call(x, temperature)
            value.backward()
            results.append((value.detach(), x.grad))
        torch.testing.assert_close(results[1], results[0])
    with pytest.raises(ValueError, match="4 of 6 positions with NaN or inf, the first 0"):
        compiled(student.clone().requires_grad_(), 0.7, teacher * NAN).backward()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_matter(backend, kind, dtype):
    student, teacher = logits(2, 100, seed=19)
    before = run(student, teacher, kind, backend=backend)
    torch.set_default_dtype(dtype)
    try:
        after = run(student, teacher, kind, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y.float(), x, rtol=1e-5, atol=1e-7)


def test_a_second_derivative_is_refused(backend):
    """It would be wrong, or missing in silence."""
    student, teacher = (x.to(DEVICE) for x in logits(2, 10))
    loss = mk.divergence_loss(student.requires_grad_(), teacher, backend=backend)
    with pytest.raises(ValueError, match=r"divergence_loss: expected a backward pass .* got create_graph=True"):
        torch.autograd.grad(loss, student, create_graph=True)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by jvp itself
def test_a_derivative_by_torch_func_is_refused():
    """That of forward mode came out as 0."""
    student, teacher = logits(3, 20, seed=20)
    loss = lambda x: mk.divergence_loss(x, teacher)  # noqa: E731
    assert loss(student) > 0
    with pytest.raises(ValueError, match=r"divergence_loss: expected no forward-mode .* backward\(\)"):
        torch.func.jvp(loss, (student,), (torch.ones_like(student),))
    with pytest.raises(
        ValueError, match=r"divergence_loss: expected no transform, got .* torch\.func\.grad.* backward\(\)"
    ):
        torch.func.grad(loss)(student)
    with torch.autograd.forward_ad.dual_level():
        assert loss(student) > 0


def test_gradients_in_a_batch(backend):
    """Of each position's loss, as `torch.autograd.functional.jacobian(vectorize=True)` takes them."""
    student, teacher = (x.to(DEVICE) for x in logits(3, 20, seed=20))
    loss = mk.divergence_loss(student.requires_grad_(), teacher, reduction="none", backend=backend)
    upstream = torch.eye(3, device=DEVICE)
    one_by_one = [torch.autograd.grad(loss, student, x, retain_graph=True)[0] for x in upstream]
    (batch,) = torch.autograd.grad(loss, student, upstream, is_grads_batched=True)
    torch.testing.assert_close(batch, torch.stack(one_by_one), rtol=0, atol=0)


def test_logits_that_share_memory_are_not_written_over(backend):
    student, teacher = logits(3, 40, seed=20)
    row = student[:1].to(DEVICE).requires_grad_()
    for inplace in (False, True):
        loss = mk.divergence_loss(
            row.expand(3, 40), teacher.to(DEVICE), inplace_backward=inplace, reduction="sum", backend=backend
        )
        loss.backward()
    torch.testing.assert_close(
        row.grad.cpu().double() / 2,
        expected(row.detach().cpu().expand(3, 40), teacher, "forward_kl")[1].sum(0, True),
        rtol=1e-5,
        atol=1e-6,
    )

"""`fused_linear_divergence` as an op of torch: under autograd and other modes, compiled, what it holds in memory."""

import contextlib
import functools
import weakref

import pytest
import torch
from divergence_cases import every_kind, options
from linear_divergence_cases import DEVICE, fused, heads, materialised
from torch.utils.checkpoint import checkpoint

import motab_kernels as mk
from motab_kernels.linear_divergence import positions_op, total_op
from motab_kernels.linear_head import Head, HeadDivergence


def test_upstream():
    """A loss that is scaled before the backward pass."""
    student, teacher = heads()
    loss, leaves = fused(student, teacher, chunk_size=4)
    (3 * loss).backward()
    expected_loss, expected_leaves = materialised(student, teacher)
    expected_loss.backward()
    for x, y in zip(leaves, expected_leaves, strict=True):
        torch.testing.assert_close(x.grad, 3 * y.grad)


def test_no_second_backward_pass_in_silence():
    loss, _ = fused(*heads())
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="expected one backward pass, which hands out the gradients in place"):
        loss.backward()


def leaves_of(student):
    return [x.clone().requires_grad_() for x in student]


def gradients_of(loss_of, student, around=contextlib.nullcontext):
    """`around`: what the backward pass runs in."""
    leaves = leaves_of(student)
    loss = loss_of(*leaves)
    with around():
        loss.backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointed(reduction):
    student, teacher = heads()

    def loss(hidden, weight, bias):
        return mk.fused_linear_divergence(
            hidden, weight, *teacher[:2], student_bias=bias, reduction=reduction, chunk_size=3
        ).sum()

    for use_reentrant in (False, True):
        found = gradients_of(lambda *x, way=use_reentrant: checkpoint(loss, *x, use_reentrant=way), student)
        torch.testing.assert_close(found, gradients_of(loss, student), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backward_pass_under_autocast_is_in_float32_too(reduction):
    student, teacher = heads(dtype=torch.float32)

    def loss(hidden, weight, bias):
        return mk.fused_linear_divergence(hidden, weight, *teacher[:2], student_bias=bias, reduction=reduction).sum()

    lower = functools.partial(torch.autocast, DEVICE, torch.bfloat16)
    torch.testing.assert_close(gradients_of(loss, student, lower), gradients_of(loss, student), rtol=0, atol=0)


def test_saved_tensors_that_are_kept_elsewhere_are_handed_out_once():
    """Under hooks autograd does not see that they have changed."""
    student, teacher = heads()
    leaves = leaves_of(student)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        loss = mk.fused_linear_divergence(*leaves[:2], *teacher[:2], student_bias=leaves[2])
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="expected one backward pass"):
        loss.backward()


def test_a_teacher_in_inference_mode():
    student, teacher = heads()
    with torch.inference_mode():
        made = [x.clone() for x in teacher]
    for reduction in ("mean", "none"):

        def loss(hidden, weight, bias, teacher, reduction=reduction):
            options = {"student_bias": bias, "teacher_bias": teacher[2], "reduction": reduction}
            return mk.fused_linear_divergence(hidden, weight, *teacher[:2], **options).sum()

        found, expected = (gradients_of(functools.partial(loss, teacher=x), student) for x in (made, teacher))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_gradient_is_computed_that_nobody_asks_for(monkeypatch):
    student, teacher = heads()
    expected, _ = fused(student, teacher)
    monkeypatch.setattr(HeadDivergence, "write_gradient", None)
    with torch.no_grad():
        loss, _ = fused(student, teacher)
    assert loss == expected


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_asks_for_no_gradient_gets_none(frozen, reduction):
    student, teacher = heads()
    leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(student)]
    teacher[1].requires_grad_()  # a head that nobody froze
    loss = mk.fused_linear_divergence(*leaves[:2], *teacher[:2], student_bias=leaves[2], reduction=reduction)
    loss.sum().backward()
    assert [x.grad is None for x in leaves] == [i == frozen for i in range(3)]
    assert teacher[1].grad is None


def test_a_second_derivative_is_refused():
    student, teacher = heads(dtype=torch.float32)
    for reduction in ("mean", "none"):
        loss, leaves = fused(student, teacher, reduction=reduction)
        with pytest.raises(ValueError, match=r"fused_linear_divergence: expected .* got create_graph=True"):
            torch.autograd.grad(loss.sum(), leaves, create_graph=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by jvp itself
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_derivative_by_torch_func_is_refused(which):
    hidden, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9)

    def loss(x):
        h, w, b = (x if i == which else y for i, y in enumerate((hidden, weight, bias)))
        return mk.fused_linear_divergence(h, w, hidden, 2 * weight, student_bias=b)

    x = (hidden, weight, bias)[which]
    with pytest.raises(ValueError, match="fused_linear_divergence: expected no forward-mode"):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    with pytest.raises(ValueError, match=r"fused_linear_divergence: expected no transform, got .* torch\.func\.grad"):
        torch.func.grad(loss)(x)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_in_a_batch(reduction):
    student, teacher = heads(dtype=torch.float32)
    loss, leaves = fused(student, teacher, reduction=reduction)
    upstream = torch.randn(3, *loss.shape, generator=torch.Generator().manual_seed(3))
    batch = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i, x in enumerate(upstream):
        loss, leaves = fused(student, teacher, reduction=reduction)
        torch.testing.assert_close([x[i] for x in batch], list(torch.autograd.grad(loss, leaves, x)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the op for each
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_keeps_the_gradients(reduction):
    student, teacher = heads(dtype=torch.float32)
    expected_loss, expected = fused(student, teacher, reduction=reduction)
    expected_loss.sum().backward()
    leaves = [x.clone().requires_grad_() for x in student]
    stacked = torch.stack((leaves[0], leaves[0].detach()))

    def one(hidden):
        return mk.fused_linear_divergence(
            hidden, leaves[1], *teacher[:2], student_bias=leaves[2], teacher_bias=teacher[2], reduction=reduction
        )

    loss = torch.func.vmap(one)(stacked)
    torch.testing.assert_close(loss, torch.stack((expected_loss, expected_loss)))
    loss[0].sum().backward()
    torch.testing.assert_close([x.grad for x in leaves], [x.grad for x in expected])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes_on_a_meta_device(reduction):
    """Which has no autocast to ask for."""
    student, teacher = ([x.to("meta") for x in side] for side in heads(dtype=torch.bfloat16))
    loss, leaves = fused(student, teacher, reduction=reduction)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert [x.grad.shape for x in leaves] == [x.shape for x in student]


def test_an_upstream_gradient_is_not_rounded():
    """A third in bfloat16 is 0.2 % more, and so was every gradient."""
    student, teacher = heads(dtype=torch.bfloat16)
    (loss, leaves), (other, thirds) = (fused(student, teacher) for _ in range(2))
    loss.backward()
    (other / 3).backward()
    for x, third in zip(leaves[:2], thirds, strict=False):
        assert torch.equal(third.grad, (x.grad.float() * torch.tensor(1 / 3)).bfloat16())


def test_an_upstream_gradient_makes_no_copy_of_a_weight_s():
    """On a CPU PyTorch copies what it multiplies in another dtype: three slices of a weight, and one of the rest."""
    student, teacher = heads(N=2, H=3, V=9000, V_teacher=9000, dtype=torch.bfloat16)
    loss, leaves = fused(student, teacher)
    with torch.profiler.profile(acc_events=True) as found:
        (loss / 3).backward()
    assert {event.key: event.count for event in found.key_averages()}["aten::mul_"] == 3 + 1 + 3
    assert all(x.grad is not None for x in leaves)


def test_autocast_takes_what_a_linear_layer_takes():
    student, teacher = heads(dtype=torch.float32)
    low = [[x.bfloat16() for x in side] for side in (student, teacher)]
    expected_loss, expected = fused(*low)
    expected_loss.backward()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, leaves = fused(student, [teacher[0].bfloat16(), *teacher[1:]])
        loss.backward()
    assert torch.equal(loss, expected_loss)
    for mine, other in zip(leaves, expected, strict=True):
        assert mine.grad.dtype == torch.float32
        assert torch.equal(mine.grad, other.grad.float())
    exact = heads()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, _ = fused(*exact)
    torch.testing.assert_close(loss, fused(*exact)[0], rtol=0, atol=0)  # which no linear layer casts


@every_kind
def test_gradcheck(kind):
    """Of "none": a reduced loss spends its gradients in the first of the many backward passes."""
    student, teacher = heads(N=3, H=4, H_teacher=5, V=6, V_teacher=6)

    def loss(hidden, weight, bias):
        return mk.fused_linear_divergence(
            hidden, weight, *teacher[:2], student_bias=bias, **options(kind), reduction="none", chunk_size=2
        )

    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in student])


def test_registered():
    student, teacher = heads(N=4, V=9, V_teacher=9)
    leaves = [x.requires_grad_() for x in student]
    shared = ([1.0, 0.0], [1.0, 0.0], "jsd", 0.5, 9, 3, False, "torch")
    mask, tau = torch.tensor([True, False, True, True]), torch.tensor(1.5)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(positions_op, (*leaves, *teacher, mask, tau, *shared), test_utils=tests)
    scale = torch.ones(4, dtype=torch.float64)
    torch.library.opcheck(total_op, (*leaves, *teacher, mask, tau, scale, [True] * 3, *shared), test_utils=tests)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction):
    student, teacher = heads()

    def loss(hidden, weight):
        return mk.fused_linear_divergence(hidden * 2, weight, *teacher[:2], reduction=reduction, chunk_size=3).sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in student[:2]]
        value = call(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_one_chunk_at_a_time(monkeypatch, reduction):
    """Of both sides: those of a chunk are gone before the next ones are made."""
    made, alive = [], []
    logits = Head.logits

    def watched(head, part):
        alive.append(sum(each() is not None for each in made))
        x = logits(head, part)
        made.append(weakref.ref(x))
        return x

    monkeypatch.setattr(Head, "logits", watched)
    loss, _ = fused(*heads(N=12), divergence="jsd", chunk_size=4, reduction=reduction, backend="torch")
    loss.sum().backward()
    assert len(made) == (6 if reduction == "mean" else 12)
    assert alive == [0, 1] * (len(made) // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [0, 7, 23])  # no block, one, and three, of which the first writes the weight's gradient
def test_gradients_do_not_depend_on_what_memory_held(monkeypatch, N, dtype):
    def gradients():
        loss, leaves = fused(*heads(N=N, dtype=dtype), chunk_size=2, backend="torch")
        loss.backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients()
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(torch.nan))
    for found, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(found, wanted)
        assert found.isfinite().all()
        assert N or not found.any()

"""Liger's losses on our ops: against float64 from their formulas, and against Liger where it is installed.

Without a GPU its Triton kernels run in Triton's interpreter. The gradients are compared by the logits, through the
softmax that its callers take.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from interop_cases import DEVICE, N, V, assert_same, every_beta, heads, jsd, pair, peer, run, some_labels

from motab_kernels import interop
from motab_kernels.backend import HAS_TRITON

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def scalars_as_a_gpu_has_them(monkeypatch):
    """Liger's kernels cast a scalar argument, which is a float32 on a GPU and Python's float in the interpreter."""
    if DEVICE == "cuda" or not HAS_TRITON:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(x):
        if not isinstance(x, float):
            return convert(x)
        return tl.tensor(interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)


def liger_jsd(module, student, teacher, labels):
    return module(student.log_softmax(-1), teacher.log_softmax(-1), labels)


@every_beta
@pytest.mark.parametrize("ignore", [False, True])
def test_liger_jsd(beta, ignore):
    student, teacher = pair(N, V)
    labels = some_labels() if ignore else None
    keep = torch.ones(N, device=DEVICE) if labels is None else (labels != -100).double()
    ours = run(lambda x: liger_jsd(interop.liger.LigerJSD(beta), x, teacher, labels), student)
    assert_same(ours, run(lambda x: (jsd(x, teacher, beta) * keep).sum() / keep.sum(), student))
    liger = peer("liger_kernel.transformers")
    assert_same(ours, run(lambda x: liger_jsd(liger.LigerJSD(beta), x, teacher, labels), student))


def test_liger_jsd_gradient_by_log_probabilities_is_projected():
    """What the docstring says: it sums to 0 at each position, where Liger's by the same tensor does not."""
    student, teacher = (x.log_softmax(-1) for x in pair(N, V))
    ours = run(lambda x: interop.liger.LigerJSD()(x, teacher), student)[1]
    torch.testing.assert_close(ours.sum(-1), torch.zeros(N, device=DEVICE), rtol=0, atol=1e-7)
    raw = run(lambda x: peer("liger_kernel.transformers").LigerJSD()(x, teacher), student)[1]
    torch.testing.assert_close(ours, raw - student.exp() * raw.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize(("reduction", "divisor"), [("batchmean", N), ("sum", 1), ("mean", N * V)])
def test_liger_kl_div(reduction, divisor, log_target):
    student, teacher = pair(N, V)
    y_true = teacher.log_softmax(-1) if log_target else teacher.softmax(-1)

    def loss(module):
        return run(lambda x: module(reduction=reduction, log_target=log_target)(x.log_softmax(-1), y_true), student)

    ours = loss(interop.liger.LigerKLDIVLoss)
    assert_same(ours, run(lambda x: jsd(x, teacher, 0).sum() / divisor, student))
    assert_same(ours, loss(peer("liger_kernel.transformers").LigerKLDIVLoss))


def test_liger_kl_div_of_probability_zero():
    """A token that the teacher excludes adds nothing and gets the gradient q."""
    student, teacher = pair(N, V)
    teacher[:, 3] = -torch.inf
    ours = run(lambda x: interop.liger.LigerKLDIVLoss(reduction="sum")(x.log_softmax(-1), teacher.softmax(-1)), student)
    torch.testing.assert_close(ours[1][:, 3], student.softmax(-1)[:, 3])
    liger = peer("liger_kernel.transformers").LigerKLDIVLoss(reduction="sum")
    assert_same(ours, run(lambda x: liger(x.log_softmax(-1), teacher.softmax(-1)), student))


@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("ignore", [False, True])
def test_liger_tvd(reduction, ignore):
    student, teacher = pair(N, V)
    teacher[0] = student[0]  # a tie, whose slope is 0
    labels = some_labels() if ignore else None
    keep = torch.ones(N, dtype=torch.bool, device=DEVICE) if labels is None else labels != -100
    divisor = {"none": 1, "batchmean": keep.sum(), "sum": 1, "mean": keep.sum() * V}[reduction]

    def formula(x):
        terms = (x.double().softmax(-1) - teacher.double().softmax(-1)).abs() / 2 * keep[:, None] / divisor
        return terms if reduction == "none" else terms.sum()

    def loss(module, x):
        return module(reduction)(x.softmax(-1), teacher.softmax(-1), labels)

    ours = run(lambda x: loss(interop.liger.LigerTVDLoss, x), student)
    assert_same(ours, run(formula, student))
    liger = peer("liger_kernel.transformers").LigerTVDLoss
    assert_same(ours, run(lambda x: loss(liger, x), student))


def test_liger_tvd_of_an_ignored_position_without_probabilities():
    p, q = (x.softmax(-1) for x in pair(N, V))
    p[1] = torch.nan
    ours = run(lambda x: interop.liger.LigerTVDLoss()(x, q, some_labels()), p)
    assert ours[0].isfinite()
    assert (ours[1][1] == 0).all()


@every_beta
@pytest.mark.parametrize("tau", [1.0, 1.7])
@pytest.mark.parametrize("ignore", [False, True])
def test_liger_fused_linear_jsd(beta, tau, ignore):
    hidden, weight, *teacher = heads()
    labels = some_labels() if ignore else None
    keep = torch.ones(N, device=DEVICE) if labels is None else (labels != -100).double()
    teacher_logits = teacher[0].double() @ teacher[1].double().T

    def formula(hidden, weight):
        rows = jsd(hidden.double() @ weight.double().T, teacher_logits, beta, tau)
        return (rows * keep).sum() / keep.sum()

    ours = interop.liger.LigerFusedLinearJSD(beta, temperature=tau)
    ours = run(lambda h, w: ours(h, w, *teacher, labels), hidden, weight)
    assert_same(ours, run(formula, hidden, weight))
    liger = peer("liger_kernel.transformers").LigerFusedLinearJSD(beta, temperature=tau)
    assert_same(ours, run(lambda h, w: liger(h, w, *teacher, labels), hidden, weight))


@every_beta
@pytest.mark.parametrize(("hard", "soft"), [(0.5, 0.5), (0.0, 0.7)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_liger_chunked_jsd(beta, hard, soft, with_bias):
    """Five positions at a time of twelve, a temperature that the hard loss does not see."""
    hidden, weight, *teacher = heads(n=12)
    bias, teacher_bias = torch.randn(2, V, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    leaves = (hidden, weight, *([bias] if with_bias else []))
    labels = some_labels(12)
    settings = {"beta": beta, "temperature": 1.7, "chunk_size": 5, "compiled": False}

    def of_teacher():
        return teacher[0].double() @ teacher[1].double().T + (teacher_bias.double() if with_bias else 0)

    def formula(hidden, weight, bias=None):
        student = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        soft_loss = jsd(student, of_teacher(), beta, 1.7)[labels != -100].mean()
        return hard * F.cross_entropy(student, labels) + soft * soft_loss

    def loss(module, *leaves, **more):
        biases = (leaves[2], teacher_bias) if with_bias else ()
        return module(hard, soft, **settings, **more)(*leaves[:2], *teacher, labels, *biases)

    ours = run(lambda *x: loss(interop.liger.LigerFusedLinearJSDLoss, *x), *leaves)
    assert_same(ours, run(formula, *leaves))
    liger = peer("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    assert_same(ours, run(lambda *x: loss(liger, *x), *leaves))
    parts = [loss(x, *leaves, return_soft_hard_loss=True) for x in (interop.liger.LigerFusedLinearJSDLoss, liger)]
    assert_same(*parts)


def test_liger_ignores_the_label_that_it_is_told():
    hidden, weight, *teacher = heads()
    student, targets = pair(N, V)
    labels, other = some_labels(), some_labels()
    other[labels == -100] = V - 1
    liger = interop.liger

    def losses(labels, **ignored):
        return [
            liger.LigerJSD(**ignored)(student.log_softmax(-1), targets.log_softmax(-1), labels),
            liger.LigerTVDLoss(**ignored)(student.softmax(-1), targets.softmax(-1), labels),
            liger.LigerFusedLinearJSD(**ignored)(hidden, weight, *teacher, labels),
            *liger.LigerFusedLinearJSDLoss(**ignored, return_soft_hard_loss=True)(hidden, weight, *teacher, labels),
        ]

    assert_same(losses(other, ignore_index=V - 1), losses(labels), rtol=0, atol=0)


def test_liger_teachers_and_parts_without_gradient():
    """None flows to the teacher, where it asks for one, nor to what is returned beside the loss."""
    hidden, weight, *teacher = heads()
    student, bias, teacher_bias = pair(N, V)[0], *torch.zeros(2, V, device=DEVICE)
    leaves = [x.requires_grad_() for x in (hidden, weight, student, bias)]
    others = [x.requires_grad_() for x in (*teacher, teacher_bias, pair(N, V)[1])]
    log_q, log_p = student.log_softmax(-1), others[-1].log_softmax(-1)
    liger = interop.liger
    chunked = liger.LigerFusedLinearJSDLoss(return_soft_hard_loss=True)
    loss, *parts = chunked(hidden, weight, *teacher, some_labels(), bias, teacher_bias)
    losses = [
        loss,
        liger.LigerJSD()(log_q, log_p),
        liger.LigerKLDIVLoss(reduction="sum", log_target=True)(log_q, log_p),
        liger.LigerTVDLoss()(log_q.exp(), log_p.exp()),
        liger.LigerFusedLinearJSD()(hidden, weight, *teacher, None),
    ]
    sum(losses).backward()
    assert all(x.grad is not None for x in leaves)
    assert all(x.grad is None for x in others)
    assert not any(x.requires_grad for x in parts)


def test_liger_nothing_counts():
    hidden, weight, *teacher = heads()
    student, targets = (x.softmax(-1) for x in pair(N, V))
    labels = torch.full((N,), -100, device=DEVICE)
    tvd = run(lambda x: interop.liger.LigerTVDLoss()(x, targets, labels), student)
    chunked = run(lambda h, w: interop.liger.LigerFusedLinearJSDLoss()(h, w, *teacher, labels), hidden, weight)
    assert all((x == 0).all() for x in (*tvd, *chunked))
    assert interop.liger.LigerKLDIVLoss(reduction="batchmean")(student[:0].log(), targets[:0]) == 0


def test_liger_low_precision_is_summed_in_float32():
    student, targets = (x.softmax(-1).bfloat16() for x in pair(N, V))
    log_q = student.log()
    found = [
        interop.liger.LigerTVDLoss("sum")(student, targets),
        interop.liger.LigerKLDIVLoss(reduction="sum")(log_q, targets),
    ]
    p, q = targets.double() / targets.double().sum(-1, keepdim=True), log_q.double().softmax(-1)
    expected = [(student.double() - targets.double()).abs().sum() / 2, (p * (p / q).log()).sum()]
    assert_same(found, expected, rtol=1e-5)
    hidden, weight, *teacher = heads(dtype=torch.bfloat16)
    weight, teacher[1] = weight.float(), teacher[1].float()  # without autocast the hidden states' dtype decides
    chunked = interop.liger.LigerFusedLinearJSDLoss(1.0, 0.0)
    labels = some_labels()
    bias = torch.linspace(-1, 1, V, device=DEVICE)
    logits = F.linear(hidden, weight.bfloat16(), bias.bfloat16()).double()
    assert_same([chunked(hidden, weight, *teacher, labels, bias)], [F.cross_entropy(logits, labels)], rtol=1e-5)


def test_liger_patched():
    """Instances made before are switched and switched back."""
    liger = peer("liger_kernel.transformers")
    chunked = peer("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(compiled=False)
    student, teacher = (x.log_softmax(-1) for x in pair(N, V))
    module = liger.LigerJSD(0.3)
    classes = type(module), liger.LigerKLDIVLoss, liger.LigerTVDLoss, liger.LigerFusedLinearJSD, type(chunked)
    before = [x.forward for x in classes]
    with interop.liger.patched():
        assert all(x.forward is getattr(interop.liger, x.__name__).forward for x in classes)
        assert torch.equal(module(student, teacher), interop.liger.LigerJSD(0.3)(student, teacher))
        liger.LigerKLDIVLoss(reduction="batchmean")(student, teacher.exp())
        liger.LigerTVDLoss()(student.exp(), teacher.exp())
        liger.LigerFusedLinearJSD()(*heads(), None)
        chunked(*heads(), some_labels())
    assert [x.forward for x in classes] == before

"""Peers' losses on our ops, and the patches that put them there: fla and speculators; Liger, TRL and verl have files
of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interop_cases import N, V, assert_same, fake_module, heads, jsd, pair, peer, run

from motab_kernels import interop
from motab_kernels.interop import patching

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def liger_jsd(student, teacher, beta):
    return interop.liger.LigerJSD(beta)(student.log_softmax(-1), teacher.log_softmax(-1))


@pytest.mark.parametrize("loss", [interop.trl.generalized_jsd_loss, liger_jsd])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("student_too", [False, True])
def test_excluded_tokens(loss, beta, student_too):
    """Where `docs/switch.md` says that TRL and Liger gave NaN: a token that the teacher excludes, or both sides."""
    student, teacher = pair(N, V)
    teacher[:, 3] = -torch.inf
    if student_too:
        student[:, 3] = -torch.inf
    value, gradient = run(lambda x: loss(x, teacher, beta=beta), student)
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = beta * torch.xlogy(p, p / m) + (1 - beta) * torch.xlogy(q, q / m) if beta else torch.xlogy(p, p / q)
    torch.testing.assert_close(value.double(), expected.nansum(-1).mean(), rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()


# flash-linear-attention


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_fla(reduction):
    hidden, weight, *teacher = heads()
    divisor = N if reduction == "batchmean" else 1
    teacher_logits = teacher[0].double() @ teacher[1].double().T

    def loss(function):
        return run(lambda h, w: function(h, teacher[0], w, teacher[1], reduction), hidden, weight)

    def formula(hidden, weight):
        return jsd(hidden.double() @ weight.double().T, teacher_logits, 0).sum() / divisor

    ours = loss(interop.fla.fused_kl_div_loss)
    assert_same(ours, run(formula, hidden, weight))
    fla = peer("fla.modules.fused_kl_div")
    assert_same(ours, loss(fla.fused_kl_div_loss))


def test_fla_patched():
    fla = peer("fla.modules.fused_kl_div")
    before = fla.fused_kl_div_loss
    hidden, weight, *teacher = heads()
    arguments = (hidden, teacher[0], weight, teacher[1])
    module = fla.FusedKLDivLoss()
    with interop.fla.patched():
        assert fla.fused_kl_div_loss is interop.fla.fused_kl_div_loss
        with pytest.raises(ValueError, match="target_weight: expected a tensor without gradient"):
            module(hidden, teacher[0], weight, teacher[1].clone().requires_grad_())  # theirs raises RuntimeError
    assert fla.fused_kl_div_loss is before
    assert_same([module(*arguments)], [interop.fla.FusedKLDivLoss()(*arguments)])


# speculators: not to be installed here; its formulas are in the docstring of its losses/fused.py.


@pytest.mark.parametrize("name", ["kl_div", "reverse_kl_div", "js_div", "tv"])
def test_speculators(name):
    """(B, T, V) to (B, T), and targets that ask for a gradient get none."""
    student, targets = pair(2, 3, V)
    targets.requires_grad_()

    def formula(x):
        q, p = (y.double().softmax(-1) for y in (x, targets.detach()))
        m = (p + q) / 2
        return {
            "kl_div": (p * (p / q).log()).sum(-1),
            "reverse_kl_div": (q * (q / p).log()).sum(-1),
            "js_div": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
            "tv": 1 - torch.minimum(p, q).sum(-1),
        }[name]

    ours = run(lambda x: getattr(interop.speculators, f"fused_{name}_loss")(x, targets), student)
    assert ours[0].shape == (2, 3)
    assert ours[0].dtype == torch.float32
    assert_same(ours, run(formula, student))


def test_speculators_patched(monkeypatch):
    fused = fake_module(monkeypatch, "speculators.losses.fused")
    names = [f"fused_{x}_loss" for x in ("kl_div", "reverse_kl_div", "js_div", "tv")]
    for name in names:
        setattr(fused, name, lambda logits, targets: None)
    before = [getattr(fused, x) for x in names]
    with interop.speculators.patched():
        assert [getattr(fused, x) for x in names] == [getattr(interop.speculators, x) for x in names]
    assert [getattr(fused, x) for x in names] == before


# Patches


@pytest.fixture
def target(monkeypatch):
    module = fake_module(monkeypatch, "some_peer.losses")
    module.loss = lambda student, teacher: "theirs"

    class Trainer:
        @staticmethod
        def loss(student, teacher):
            return "theirs"

    module.Trainer = Trainer
    return module


def ours(student, teacher, *, more=None):
    return "ours"


TARGETS = [
    patching.Target("some_peer.losses", "loss", ours),
    patching.Target("some_peer.losses", "Trainer.loss", staticmethod(ours)),
]


def called(target):
    return target.loss(0, 0), target.Trainer.loss(0, 0), target.Trainer().loss(0, 0)


def test_patch_is_undone(target):
    undo = patching.patch("some_peer 1.0", TARGETS)
    assert called(target) == ("ours",) * 3
    undo()
    assert called(target) == ("theirs",) * 3
    patching.patch("some_peer 1.0", TARGETS)
    undo()  # a second time: nothing, for it is not this patch's any more
    assert called(target) == ("ours",) * 3


def test_patched_is_undone_on_exceptions_and_nests(target):
    def patched(result):
        targets = [patching.Target("some_peer.losses", "loss", lambda student, teacher: result)]
        return patching.as_context(patching.patch)("some_peer 1.0", targets)

    def fail():
        with patched("inner"):
            assert target.loss(0, 0) == "inner"
            raise KeyError

    with patched("outer"):
        with pytest.raises(KeyError):
            fail()
        assert target.loss(0, 0) == "outer"
    assert target.loss(0, 0) == "theirs"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("no_such_peer.x", "loss", ours), "no_such_peer.x: expected some_peer 1.0 to be installed, got No module"),
        (("some_peer.losses", "gone", ours), r"losses\.gone: expected it to exist, as in some_peer 1\.0"),
        (("some_peer.losses", "Gone.loss", ours), r"losses\.Gone\.loss: expected it to exist"),
        (
            ("some_peer.losses", "loss", lambda student: None),
            r"expected parameters \['student'\], as in some_peer 1\.0, got \['student', 'teacher'\]",
        ),
    ],
)
def test_a_patch_that_does_not_fit_changes_nothing(target, bad, message):
    with pytest.raises(ValueError, match=message):
        patching.patch("some_peer 1.0", [*TARGETS, patching.Target(*bad)])
    assert called(target) == ("theirs",) * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: interop.liger.LigerKLDIVLoss(reduction="none")(x, y), "expected one of sum, mean, batchmean"),
        (lambda x, y: interop.liger.LigerTVDLoss("avg")(x, y), "expected one of none, sum, mean, batchmean, got 'avg'"),
        (lambda x, y: interop.trl.generalized_jsd_loss(x, y, reduction="none"), "batchmean, sum, mean, got 'none'"),
        (lambda x, y: interop.fla.fused_kl_div_loss(x, x, y, y, "mean"), "expected batchmean or sum, got 'mean'"),
        (lambda x, y: interop.fla.FusedKLDivLoss("sum"), "expected batchmean, got 'sum'"),
    ],
)
def test_bad_reduction(call, message):
    with pytest.raises(ValueError, match=message):
        call(*(x.softmax(-1) for x in pair(N, V)))


def test_imports_no_peer():
    code = (
        "import sys, motab_kernels.interop; "
        "print([x for x in ('trl', 'liger_kernel', 'fla', 'transformers', 'verl') if x in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert found.stdout.strip() == "[]"

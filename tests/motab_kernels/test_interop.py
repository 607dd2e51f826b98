"""Peers' losses on our ops: against float64 from each peer's formula, and against the peer where it is installed.

Without a GPU the peers' Triton kernels run in Triton's interpreter.
"""

import contextlib
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from divergence_cases import logits

from motab_kernels import interop
from motab_kernels.backend import HAS_TRITON
from motab_kernels.interop import patching

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = Path(__file__).parents[2] / "examples" / "tiny"
BETAS = [0.0, 0.1, 0.5, 1.0]
N, V, H, H_T = 6, 37, 5, 7  # a teacher of another width

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
every_beta = pytest.mark.parametrize("beta", BETAS)


def peer(name):
    """A peer's module, or skip; what it warns of at import is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


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


# Liger: the gradients are compared by the logits, through the softmax that its callers take.


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


# TRL


@every_beta
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)])
def test_trl_generalized_jsd(beta, with_labels, reduction, items):
    student, teacher = pair(3, 4, V)
    labels = some_labels(12).view(3, 4) if with_labels else None
    keep = torch.ones(3, 4, device=DEVICE) if labels is None else (labels != -100).double()
    batch = keep.sum() if with_labels else 3
    divisor = 11 if items is not None else {"batchmean": batch, "sum": 1, "mean": keep.sum() * V}[reduction]
    options = (labels, beta, 1.3, reduction, items)
    ours = run(lambda x: interop.trl.generalized_jsd_loss(x, teacher, *options), student)
    assert_same(ours, run(lambda x: (jsd(x, teacher, beta, 1.3) * keep).sum() / divisor, student))
    trl = peer("trl.experimental.gkd.gkd_trainer").GKDTrainer
    assert_same(ours, run(lambda x: trl.generalized_jsd_loss(x, teacher, *options), student))


CASES = {
    "plain": {},
    "num_items": {"num_items_in_batch": 11},
    "num_items tensor": {"num_items_in_batch": torch.tensor(11)},
    "bias": {"bias": True},
    "all": {
        "bias": True,
        "student_logit_scale": 0.7,
        "teacher_logit_scale": 1.4,
        "student_final_logit_softcapping": 2.0,
        "teacher_final_logit_softcapping": 3.0,
        "temperature": 1.3,
    },
}


@every_beta
@pytest.mark.parametrize("case", CASES)
def test_trl_chunked_divergence(beta, case):
    """Loss, gradients, the sum of entropies and the count, with NaN among what is masked."""
    options = dict(CASES[case])
    hidden, weight, teacher_hidden, teacher_weight = heads(n=12)
    mask = (some_labels(12) != -100).view(3, 4)
    hidden[~mask.view(-1)] = torch.nan
    hidden, teacher_hidden = hidden.view(3, 4, H), teacher_hidden.view(3, 4, H_T)
    bias, teacher_bias = torch.randn(2, V, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    leaves = (hidden, weight, *([bias] if options.pop("bias", False) else []))
    scale, softcap = options.get("student_logit_scale", 1.0), options.get("student_final_logit_softcapping")
    t_scale, t_softcap = options.get("teacher_logit_scale", 1.0), options.get("teacher_final_logit_softcapping")
    tau, items = options.get("temperature", 1.0), options.get("num_items_in_batch", mask.sum())

    def logits(hidden, weight, bias, scale, softcap):
        x = scale * (hidden[mask].double() @ weight.double().T + bias)
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    def formula(hidden, weight, bias=0):
        student = logits(hidden, weight, bias, scale, softcap)
        teacher = logits(teacher_hidden, teacher_weight, teacher_bias if len(leaves) == 3 else 0, t_scale, t_softcap)
        log_q = (student / tau).log_softmax(-1)
        return jsd(student, teacher, beta, tau).sum() / items, -(log_q.exp() * log_q).sum(), mask.sum()

    def loss(function, hidden, weight, bias=None):
        biases = {} if bias is None else {"student_lm_head_bias": bias, "teacher_lm_head_bias": teacher_bias}
        return function(hidden, teacher_hidden, weight, teacher_weight, mask.long(), beta, **biases, **options)

    def results(function, *leaves):
        leaves = [x.clone().requires_grad_() for x in leaves]
        value, *others = function(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves), *(x.detach() for x in others)

    ours = results(lambda *x: loss(interop.trl.chunked_divergence_loss, *x), *leaves)
    assert_same(ours, results(formula, *leaves), rtol=1e-4)
    trl = peer("trl.trainer.distillation_trainer")._chunked_divergence_loss
    clean = (hidden.nan_to_num(), *leaves[1:])  # on a CPU TRL multiplies what is masked too
    assert_same(ours, results(lambda *x: loss(trl, *x), *clean), rtol=1e-4)


def test_trl_chunked_divergence_without_tokens_or_entropy():
    hidden, weight, *teacher = heads()
    mask = torch.zeros(1, N, device=DEVICE)
    arguments = (hidden[None].requires_grad_(), teacher[0][None], weight, teacher[1], mask, 0.5)
    loss, entropy, count = interop.trl.chunked_divergence_loss(*arguments)
    loss.backward()
    assert (loss, entropy, count) == (0, 0, 0)
    assert (hidden.grad is None) or (hidden.grad == 0).all()
    assert interop.trl.chunked_divergence_loss(*arguments, entropy=False)[1].isnan()


def test_trl_chunked_divergence_under_autocast():
    """Weights in float32, products in bfloat16, gradients in float32 again, as a Trainer with `bf16=True` does it."""
    hidden, weight, *teacher = heads()
    mask = torch.ones(1, N, device=DEVICE)

    def loss(function, hidden, weight):
        with torch.autocast(DEVICE, torch.bfloat16):
            return function(hidden[None], teacher[0][None], weight, teacher[1], mask, 0.5)[0]

    ours = run(lambda *x: loss(interop.trl.chunked_divergence_loss, *x), hidden, weight)
    assert ours[2].dtype == torch.float32
    expected = run(lambda h, w: jsd(h @ w.T, teacher[0] @ teacher[1].T, 0.5).mean(), hidden, weight)
    assert_same(ours, expected, rtol=5e-2, atol=1e-2)
    trl = peer("trl.trainer.distillation_trainer")._chunked_divergence_loss
    assert_same(ours, run(lambda *x: loss(trl, *x), hidden, weight), rtol=5e-2, atol=1e-2)


def test_trl_gathers_a_sharded_head():
    """FSDP2's DTensor, by the method that it is known by."""
    hidden, weight, *teacher = heads()
    arguments = (hidden[None], teacher[0][None], weight, teacher[1], torch.ones(1, N, device=DEVICE), 0.5)
    shards = [types.SimpleNamespace(full_tensor=lambda x=x: x) for x in (weight, teacher[1])]
    sharded = interop.trl.chunked_divergence_loss(*arguments[:2], *shards, *arguments[4:])
    assert_same(sharded, interop.trl.chunked_divergence_loss(*arguments), rtol=0, atol=0)


def test_trl_patched():
    trainer, gkd = peer("trl.trainer.distillation_trainer"), peer("trl.experimental.gkd.gkd_trainer").GKDTrainer
    before = trainer._chunked_divergence_loss, gkd.generalized_jsd_loss
    student, teacher = pair(3, 4, V)
    with interop.trl.patched(entropy=False):
        assert gkd.generalized_jsd_loss is interop.trl.generalized_jsd_loss
        of_instance = object.__new__(gkd).generalized_jsd_loss(student, teacher, beta=0.3)
        hidden, weight, *others = heads()
        mask = torch.ones(1, N, device=DEVICE)
        _, entropy, _ = trainer._chunked_divergence_loss(hidden[None], others[0][None], weight, others[1], mask, 0.5)
        assert entropy.isnan()
    assert of_instance == interop.trl.generalized_jsd_loss(student, teacher, beta=0.3)
    assert (trainer._chunked_divergence_loss, gkd.generalized_jsd_loss) == before


@pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own
@pytest.mark.parametrize("bf16", [False, True])
def test_trl_trainer_takes_the_same_step_under_the_patch(tmp_path, bf16):
    """One on-policy step of DistillationTrainer on the tiny pair: loss, gradient norm and logged entropy."""
    trl = peer("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = Dataset.from_list([{"prompt": "12 + 30 - 4 ="}, {"prompt": "7 + 8 - 2 + 1 ="}])

    def step(context):
        arguments = trl.DistillationConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            max_completion_length=12,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=bf16,
        )
        with context:
            trainer = trl.DistillationTrainer(
                model=AutoModelForCausalLM.from_pretrained(TINY / "student"),
                teacher_model=AutoModelForCausalLM.from_pretrained(TINY / "teacher"),
                args=arguments,
                train_dataset=prompts,
                processing_class=AutoTokenizer.from_pretrained(TINY / "student"),
            )
            trainer.train()
        return trainer.state.log_history[0]

    theirs, ours = step(contextlib.nullcontext()), step(interop.trl.patched())
    for name in ("loss", "grad_norm", "entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=2e-2 if bf16 else 1e-5)
    assert ours["loss"] > 0.1
    assert step(interop.trl.patched(entropy=False))["entropy"] is None


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


# verl: not to be installed here; its formula and the places that call it are those of its trainer/distillation.


def test_verl_forward_kl_topk():
    """Of a student in bfloat16, against what the k tokens show; below 0 somewhere, and a position without a teacher."""
    k = 4
    student, teacher = pair(2, 3, V, dtype=torch.bfloat16, scale=1.0, noise=0.3)
    log_p, ids = teacher.double().log_softmax(-1).topk(k, -1)
    student[0, 0, ids[0, 0]] = student.max()  # the student gives the k tokens more than the teacher
    log_p[1, 2] = -torch.inf

    def formula(x):
        log_q = x.double().log_softmax(-1).gather(-1, ids)
        return torch.where(log_p.isinf(), 0, log_p.exp() * (log_p - log_q)).sum(-1)

    ours = run(lambda x: interop.verl.forward_kl_topk(x, log_p, ids), student)
    expected = run(formula, student)
    assert expected[0].min() < -0.1
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], expected[1].bfloat16(), rtol=1e-2, atol=1e-6)


@pytest.fixture
def verl(monkeypatch):
    """verl's registry, and its way from a micro-batch to a loss, as far as the patch touches them."""
    losses = fake_module(monkeypatch, "verl.trainer.distillation.losses")
    losses.DISTILLATION_LOSS_REGISTRY, losses.DISTILLATION_SETTINGS_REGISTRY = {}, {}
    losses.DistillationLossSettings = types.SimpleNamespace

    def register_distillation_loss(settings):
        def register(function):
            for name in settings.names:
                losses.DISTILLATION_LOSS_REGISTRY[name] = function
                losses.DISTILLATION_SETTINGS_REGISTRY[name] = settings
            return function

        return register

    def compute_topk_loss(config, distillation_config, data, student_logits, data_format):
        return "verl's"

    losses.register_distillation_loss, losses.compute_topk_loss = register_distillation_loss, compute_topk_loss
    fake_module(monkeypatch, "verl.workers.utils.padding").no_padding_2_padding = lambda x, data: x[
        :, -data["length"] :
    ]
    return losses


def verl_config(mode, clamp=None):
    return types.SimpleNamespace(
        distillation_loss=types.SimpleNamespace(loss_mode=mode, log_prob_min_clamp=clamp),
    )


def test_verl_patched(verl):
    original = verl.compute_topk_loss
    student, teacher = pair(1, 5, V)
    log_p, ids = teacher.log_softmax(-1).topk(4, -1)
    mask = torch.tensor([[1, 1, 0]], device=DEVICE)
    data = {"teacher_logprobs": log_p, "teacher_ids": ids, "response_mask": mask, "length": 3}
    fsdp = types.SimpleNamespace(strategy="fsdp")
    with interop.verl.patched():
        assert verl.DISTILLATION_SETTINGS_REGISTRY[interop.verl.LOSS_MODE].use_topk
        assert verl.compute_topk_loss(fsdp, verl_config("forward_kl_topk"), data, student, "thd") == "verl's"
        config = verl_config(interop.verl.LOSS_MODE)
        output = verl.compute_topk_loss(fsdp, config, data, student, "thd")
        loss, metrics = verl.DISTILLATION_LOSS_REGISTRY[interop.verl.LOSS_MODE](
            config=fsdp, distillation_config=config, model_output=output, data=data
        )
        torch.testing.assert_close(loss, interop.verl.forward_kl_topk(student, log_p, ids)[:, -3:])
        mass = log_p.exp().sum(-1)[0, 2:4].mean()
        assert metrics == {"distillation/teacher_mass": pytest.approx(mass.item())}
        with pytest.raises(ValueError, match="expected one patch at a time"):
            interop.verl.patch()
    assert verl.compute_topk_loss is original
    assert verl.DISTILLATION_LOSS_REGISTRY == verl.DISTILLATION_SETTINGS_REGISTRY == {}


def test_verl_takes_packed_teachers():
    student, teacher = pair(1, 5, V)
    log_p, ids = teacher.log_softmax(-1).topk(4, -1)
    packed = [
        torch.nested.nested_tensor_from_jagged(x[0], torch.tensor([0, 2, 5], device=DEVICE)) for x in (log_p, ids)
    ]
    data = dict(zip(("teacher_logprobs", "teacher_ids"), packed, strict=True))
    fsdp = types.SimpleNamespace(strategy="fsdp")
    output = interop.verl.compute_topk_loss(fsdp, verl_config("any"), data, student, "thd")
    torch.testing.assert_close(output["distillation_losses"], interop.verl.forward_kl_topk(student, log_p, ids))


@pytest.mark.parametrize(
    ("strategy", "clamp", "positions", "message"),
    [
        ("megatron", None, 5, 'expected logits of the whole vocabulary, got "megatron"'),
        ("fsdp", -10.0, 5, "log_prob_min_clamp: expected None"),
        ("fsdp", None, 4, r"expected \(1, 5\) positions.*got \(1, 4\): sequence parallelism"),
    ],
)
def test_verl_refuses(strategy, clamp, positions, message):
    student, teacher = pair(1, 5, V)
    log_p, ids = (x[:, :positions] for x in teacher.log_softmax(-1).topk(4, -1))
    data = {"teacher_logprobs": log_p, "teacher_ids": ids}
    with pytest.raises(ValueError, match=message):
        interop.verl.compute_topk_loss(
            types.SimpleNamespace(strategy=strategy), verl_config("any", clamp), data, student, "thd"
        )


# Patches


def fake_module(monkeypatch, name):
    """An empty module under this name, and packages above it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    return sys.modules[name]


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
        return patching.patched(lambda: patching.patch("some_peer 1.0", targets))

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
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TINY.parents[1]
    )
    assert found.stdout.strip() == "[]"

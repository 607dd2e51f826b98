"""TRL's losses on our ops: against float64 from their formulas, and against TRL where it is installed."""

import contextlib
from pathlib import Path

import pytest
import torch
from interop_cases import DEVICE, H_T, H, N, V, assert_same, every_beta, heads, jsd, pair, peer, run, some_labels

from motab_kernels import interop

TINY = Path(__file__).parents[2] / "examples" / "tiny"


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


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_trl_generalized_jsd_where_nothing_counts(reduction):
    student, teacher = pair(3, 4, V)
    labels = torch.full((3, 4), -100, device=DEVICE)
    found = run(lambda x: interop.trl.generalized_jsd_loss(x, teacher, labels, reduction=reduction), student)
    assert all((x == 0).all() for x in found)
    nothing = interop.trl.generalized_jsd_loss(student[:0], teacher[:0])
    assert nothing == 0


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
def test_trl_chunked_divergence(monkeypatch, beta, case):
    """Loss, gradients, the sum of entropies (of three positions at a time) and the count; NaN among what is masked."""
    monkeypatch.setattr(interop.trl, "BUDGET", 3 * V * 4)
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
    teacher = [x.requires_grad_() for x in teacher]  # and gets none
    arguments = (hidden[None].requires_grad_(), teacher[0][None], weight, teacher[1], mask, 0.5)
    loss, entropy, count = interop.trl.chunked_divergence_loss(*arguments)
    loss.backward()
    assert (loss, entropy, count) == (0, 0, 0)
    assert (hidden.grad is None) or (hidden.grad == 0).all()
    assert [x.grad for x in teacher] == [None, None]
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


def one_step(trainer, config, dataset, folder, context, **settings):
    """What a TRL trainer logs of one step on the tiny pair."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = config(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    with context:
        made = trainer(
            model=AutoModelForCausalLM.from_pretrained(TINY / "student"),
            teacher_model=AutoModelForCausalLM.from_pretrained(TINY / "teacher"),
            args=arguments,
            train_dataset=Dataset.from_list(dataset),
            processing_class=AutoTokenizer.from_pretrained(TINY / "student"),
        )
        made.train()
    return made.state.log_history[0]


@pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own
@pytest.mark.parametrize("bf16", [False, True])
def test_trl_distillation_trainer_takes_the_same_step(tmp_path, bf16):
    """On-policy, its loss, gradient norm and logged entropy with and without the patch."""
    trl = peer("trl")
    prompts = [{"prompt": "12 + 30 - 4 ="}, {"prompt": "7 + 8 - 2 + 1 ="}]

    def step(context):
        settings = {"max_completion_length": 12, "bf16": bf16}
        return one_step(trl.DistillationTrainer, trl.DistillationConfig, prompts, tmp_path, context, **settings)

    theirs, ours = step(contextlib.nullcontext()), step(interop.trl.patched())
    for name in ("loss", "grad_norm", "entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=2e-2 if bf16 else 1e-5)
    assert ours["loss"] > 0.1
    assert step(interop.trl.patched(entropy=False))["entropy"] is None


@pytest.mark.filterwarnings("ignore")
@every_beta
def test_trl_gkd_trainer_takes_the_same_step(tmp_path, beta):
    gkd = peer("trl.experimental.gkd")
    turns = [("12 + 30 - 4 =", "12 + 30 = 42.\n\n42 - 4 = 38."), ("7 + 8 =", "7 + 8 = 15.")]
    messages = [{"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": y}]} for x, y in turns]

    def step(context):
        settings = {"lmbda": 0.0, "beta": beta, "max_length": 64, "bf16": False}
        return one_step(gkd.GKDTrainer, gkd.GKDConfig, messages, tmp_path, context, **settings)

    theirs, ours = step(contextlib.nullcontext()), step(interop.trl.patched())
    for name in ("loss", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert ours["loss"] > 0.05


def test_columns_beyond_the_narrower_side_are_padding():
    student, teacher = pair(N, V)
    wider = torch.cat((teacher, teacher[:, :5]), 1)
    loss = interop.trl.generalized_jsd_loss
    assert_same(run(lambda x: loss(x, wider), student), run(lambda x: loss(x, teacher), student), rtol=0, atol=0)

"""verl's top-k loss on ours. verl is not to be installed here: its formula, and the places that call it, are as in its
sources."""

import types

import pytest
import torch
from interop_cases import DEVICE, V, fake_module, pair, run

from motab_kernels import interop


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

    log_p.requires_grad_()  # and gets none
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
        packed = data | {"response_mask": torch.nested.nested_tensor(list(mask), layout=torch.jagged)}
        registered = verl.DISTILLATION_LOSS_REGISTRY[interop.verl.LOSS_MODE]
        assert registered(fsdp, config, output, packed)[1] == metrics
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

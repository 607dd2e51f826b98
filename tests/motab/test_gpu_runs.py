"""On a GPU everything is as on the CPU, and the host waits for it where it must."""

import copy

import pytest
import torch
from engine_cases import POLICY, check_same, run
from test_trainer import TRAJECTORIES, config

import motab
from motab.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
SETTINGS = {"max_new_tokens": 11, "batch_size": 2, "block_size": 4}


def on_both(*models):
    """In float32, for the kernels: on the CPU and on the GPU."""
    of_cpu = [copy.deepcopy(model).float() for model in models]
    return of_cpu, [copy.deepcopy(model).cuda() for model in of_cpu]


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        (motab.TokenSKD(top_k=2), {"temperature": 0.8, "top_p": 0.9, "seed": 3}),
        (motab.MotabPolicy(0.3, 0.5, max_interventions=3), {"max_cached_tokens": 100}),
        (motab.AdaSwitch(factor=2.0, window=4), {}),
        (motab.TeacherOnly(), {}),
    ],
)
def test_policies(student, teacher, tokenizer, prompts, policy, settings):
    of_cpu, of_gpu = on_both(student, teacher)
    expected, found = (run(*pair, tokenizer, prompts[:3], policy, **SETTINGS, **settings) for pair in (of_cpu, of_gpu))
    check_same(found, expected)


def test_the_host_waits_where_it_is_counted(student, teacher, tokenizer, prompts, monkeypatch):
    """Once a block, and nowhere else in a run."""
    of_cpu, of_gpu = on_both(student, teacher)
    expected = run(*of_cpu, tokenizer, prompts[:3], POLICY, **SETTINGS)
    check_same(run(*of_gpu, tokenizer, prompts[:3], POLICY, **SETTINGS), expected)  # and compiles the kernels
    to_host, waits = Engine._to_host, []

    def waiting(engine, *tensors):
        torch.cuda.set_sync_debug_mode("default")
        found = to_host(engine, *tensors)
        waits.append(engine.waits)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(Engine, "_to_host", waiting)
    trajectories = motab.synthesize(*of_gpu, tokenizer, prompts[:3], policy=POLICY, temperature=0.0, **SETTINGS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(trajectories)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [*range(1, len(waits) + 1)]
    check_same(found, expected)


def test_recurrent_states(tokenizer, prompts):
    from test_recurrent_writer import pair_of  # skips this test with transformers before 5.24

    of_cpu, of_gpu = on_both(*pair_of("qwen3_5_text", tokenizer))
    expected, found = (run(*pair, tokenizer, prompts[:3], POLICY, **SETTINGS) for pair in (of_cpu, of_gpu))
    check_same(found, expected)


@pytest.mark.parametrize("padding_free", [False, True])
def test_training(student, teacher, tmp_path, padding_free):
    """On given trajectories."""
    students = []
    for pair, use_cpu in zip(on_both(student, teacher), (True, False), strict=True):
        settings = {"use_cpu": use_cpu, "padding_free": padding_free, "loss_type": "jsd", "learning_rate": 1e-2}
        args = config(tmp_path, max_steps=2, max_grad_norm=0.1, **settings)
        trainer = motab.MotabTrainer(*pair, args, train_dataset=TRAJECTORIES)
        assert trainer.args.device.type == ("cpu" if use_cpu else "cuda")
        trainer.train()
        students.append({name: x.detach().cpu() for name, x in trainer.model.named_parameters()})
    before = student.state_dict()
    for name, x in students[0].items():
        assert (x - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(students[1][name], x, rtol=1e-4, atol=1e-4)


def test_training_on_what_the_student_writes(student, teacher, tokenizer, prompts, tmp_path):
    losses = []
    for pair, use_cpu in zip(on_both(student, teacher), (True, False), strict=True):
        rollouts = motab.Rollouts(prompts[:2], POLICY, max_new_tokens=8, batch_size=2, block_size=4)
        args = config(tmp_path, use_cpu=use_cpu, loss_type="reverse_kl", max_steps=1, per_device_train_batch_size=2)
        trainer = motab.MotabTrainer(*pair, args, train_dataset=rollouts, processing_class=tokenizer)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)

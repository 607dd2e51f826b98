"""On-policy distillation as TRL's trainer does it: the same text, the same steps."""

import pytest
import torch
from test_cli import TINY

import motab

STEPS, PROMPTS = 2, 4
QUESTION = "State the final answer to the following arithmetic problem: {} - 57 + 90 ="
MESSAGES = [[{"role": "user", "content": QUESTION.format(number)}] for number in range(10, 10 + STEPS * PROMPTS)]
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": PROMPTS // 2,
    "train_sampling_strategy": "sequential",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


@pytest.mark.filterwarnings(r"ignore:.*gradient_checkpointing\W is deprecated:FutureWarning")  # TRL uses it
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_steps_of_trl(tmp_path, beta):
    """Greedily: its top_k is 1, and its temperature divides logits in the loss too."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = motab.load_tokenizer(str(TINY / "student"))

    def models():
        return [motab.load_model(str(TINY / name)) for name in ("student", "teacher")]

    writing = {"max_completion_length": 100, "temperature": 1.0, "top_k": 1, "shuffle_dataset": False}
    theirs = trl.DistillationTrainer(
        *models(),
        trl.DistillationConfig(str(tmp_path / "trl"), beta=beta, gradient_checkpointing=False, **writing, **SETTINGS),
        train_dataset=datasets.Dataset.from_dict({"prompt": MESSAGES}),
        processing_class=tokenizer,
    )
    ours = motab.MotabTrainer(
        *models(),
        motab.MotabConfig(str(tmp_path / "motab"), loss_type="jsd", beta=beta, **SETTINGS),
        train_dataset=motab.Rollouts(MESSAGES, motab.OnPolicy(), max_new_tokens=100, temperature=0.0),
        processing_class=tokenizer,
    )
    logged = {}
    for trainer in (theirs, ours):
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        logged[trainer] = [(entry["loss"], entry["grad_norm"]) for entry in entries]
    assert len(logged[ours]) == STEPS
    for a, b in zip(logged[theirs], logged[ours], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    before = models()[0]
    for a, b, start in zip(theirs.model.parameters(), ours.model.parameters(), before.parameters(), strict=True):
        moved = (b - start).norm()
        assert moved > 0
        assert (a - b).norm() < 1e-3 * moved
    torch.testing.assert_close(theirs.model.lm_head.weight, ours.model.lm_head.weight, rtol=1e-5, atol=1e-6)

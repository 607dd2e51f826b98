"""Batches without padding give the same step."""

import copy

import pytest
import torch
from conftest import make_model
from test_trainer import TRAJECTORIES, config, softcapped_model, step, trajectory
from transformers import Lfm2Config, Lfm2ForCausalLM, MixtralConfig, MixtralForCausalLM

import motab
from motab.dataset import IGNORED, TrajectoryDataset, collate
from motab.padding import reads_rows_apart, without_padding


def test_a_batch_as_one_row():
    batch = collate(list(TrajectoryDataset([*TRAJECTORIES, trajectory(2, [], [5, 0], ["teacher"] * 2)])))
    kept = copy.deepcopy(batch)
    found = without_padding(batch)
    assert found["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 5, 0]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1]]
    none = IGNORED
    assert found["labels"].tolist() == [[none, none, 3, 4, 5, 6, 7, none, 9, 0, none, 0]]
    assert sorted(found) == ["input_ids", "labels", "position_ids"]
    assert all(torch.equal(batch[name], kept[name]) for name in kept)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "jsd"])
@pytest.mark.parametrize("make", [make_model, softcapped_model])
def test_the_same_step(tmp_path, loss_type, make):
    """From heads and from logits, whatever the micro-batch, and no model sees padding."""
    student, teacher = make(3), make_model(4) if loss_type == "jsd" else None
    settings = {"loss_type": loss_type, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    loss, norm, padded = step(tmp_path / "padded", student, teacher, 2, **settings)
    lengths = []
    for model in filter(None, (student, teacher)):
        model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs.get("input_ids", args[0] if args else None).numel()),
            with_kwargs=True,
        )
    for size in (1, 2):
        lengths.clear()
        *found, trainer = step(tmp_path / str(size), student, teacher, size, **settings, padding_free=True)
        assert found == pytest.approx([loss, norm], rel=1e-6)
        for a, b in zip(padded.model.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        of_batches = [7, 3] if size == 1 else [10]
        models = 1 if teacher is None else 2
        assert sorted(lengths[-models * len(of_batches) :]) == sorted(of_batches * models)  # before: looks at them


def test_the_same_held_out_loss(tmp_path):
    def evaluated(name, **settings):
        args = config(tmp_path / name, per_device_eval_batch_size=2, **settings)
        trainer = motab.MotabTrainer(make_model(3), args=args, train_dataset=TRAJECTORIES, eval_dataset=TRAJECTORIES)
        return trainer.evaluate()["eval_loss"]

    assert evaluated("free", padding_free=True) == pytest.approx(evaluated("padded"), rel=1e-9)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "jsd"])
def test_a_model_that_reads_rows_otherwise(tmp_path, monkeypatch, loss_type):
    """One that sees the rows before its own."""
    student, teacher = make_model(3), make_model(4) if loss_type == "jsd" else None
    assert reads_rows_apart(student)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    assert not reads_rows_apart(student)
    args = config(tmp_path, loss_type=loss_type, padding_free=True)
    with pytest.raises(ValueError, match=r"padding_free needs models that read rows .* got LlamaForCausalLM"):
        motab.MotabTrainer(student, teacher, args, train_dataset=TRAJECTORIES)
    motab.MotabTrainer(student, teacher, config(tmp_path, loss_type=loss_type), train_dataset=TRAJECTORIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_another_result(monkeypatch, dtype):
    model = make_model(3).to(dtype).train()
    model.config.attention_dropout = 0.5
    assert reads_rows_apart(model)
    assert model.training
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    assert not reads_rows_apart(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_would_hide(dtype):
    """A convolution sees the row before, and changes logits by less than bfloat16 rounds those of another batch."""
    settings = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    torch.manual_seed(0)
    assert not reads_rows_apart(Lfm2ForCausalLM(Lfm2Config(**settings, **heads)).to(dtype))


def test_experts_are_no_reason():
    """Whose batches hold what tokens of all rows choose."""
    settings = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
    torch.manual_seed(0)
    assert reads_rows_apart(MixtralForCausalLM(MixtralConfig(**settings, **heads)).bfloat16())


def test_models_are_looked_at_in_the_precision_of_the_training(tmp_path, monkeypatch):
    """Flash attention refuses float32, in which the weights are kept."""
    seen = []
    for name in ("has_plain_head", "reads_rows_apart"):
        monkeypatch.setattr(
            f"motab.trainer.{name}", lambda model: seen.append(torch.is_autocast_enabled("cpu")) or True
        )
    args = config(tmp_path, loss_type="jsd", bf16=True, padding_free=True)
    motab.MotabTrainer(make_model(3).float(), make_model(4).float(), args, train_dataset=TRAJECTORIES)
    assert seen == [True] * 4


def test_models_are_looked_at_without_flash_attention_on_a_cpu(tmp_path):
    """Where they are before FSDP shards them."""
    models = make_model(3).float(), make_model(4).float()
    for model in models:
        model.config._attn_implementation = "flash_attention_2"
    args = config(tmp_path, loss_type="jsd", padding_free=True)
    assert motab.MotabTrainer(*models, args, train_dataset=TRAJECTORIES).fuses_head
    assert all(model.config._attn_implementation == "flash_attention_2" for model in models)

"""What a trainer takes, and what it refuses before it trains."""

import datasets
import pytest
import torch
from conftest import make_model
from test_trainer import TRAJECTORIES, config
from transformers import TrainingArguments

import motab
from motab.config import LOSS_TYPES
from motab.models import load_model, load_with_adapters, with_lora


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"ignore_authors must be among student, flawed.* got me"):
        config(tmp_path, ignore_authors=["me"])
    with pytest.raises(ValueError, match="names every author"):
        config(tmp_path, ignore_authors=["student", "flawed", "stitch", "teacher"])
    with pytest.raises(ValueError, match="at least one trajectory or prompt, got none"):
        motab.MotabTrainer(make_model(3), args=config(tmp_path), train_dataset=[])
    with pytest.raises(ValueError, match="leave it out, or set loss_type"):
        motab.MotabTrainer(make_model(3), make_model(4), config(tmp_path), train_dataset=TRAJECTORIES)
    with pytest.raises(ValueError, match=r"loss_type forward_kl .* give teacher_model"):
        motab.MotabTrainer(make_model(3), args=config(tmp_path, loss_type="forward_kl"), train_dataset=TRAJECTORIES)
    with pytest.raises(ValueError, match="save_rollouts keeps what Rollouts write, got finished trajectories"):
        motab.MotabTrainer(make_model(3), args=config(tmp_path, save_rollouts=True), train_dataset=TRAJECTORIES)
    with pytest.raises(ValueError, match=r"loss_type must be one of cross_entropy, forward_kl.* got 'kl'"):
        config(tmp_path, loss_type="kl")
    with pytest.raises(ValueError, match=r"min_lr .* at most the learning rate 1e-06, got 0.001: .* leave it out"):
        config(tmp_path, learning_rate=1e-6, lr_scheduler_kwargs={"min_lr": 1e-3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 7.0}, "beta must lie in 0 to 1, .* got 7.0"),
        ({"beta": float("nan")}, "beta must lie in 0 to 1, .* got nan"),
        ({"alpha": 1.0}, "alpha must be at least 0 and below 1, got 1.0"),
        ({"alpha": -0.1}, "alpha must be at least 0 and below 1, got -0.1"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be finite and above 0, got inf"),
    ],
)
def test_settings_of_a_divergence(tmp_path, settings, message):
    """Known before models are loaded, not at the first batch."""
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)
    config(tmp_path, loss_type="jsd", beta=1.0)
    config(tmp_path, loss_type="jsd", beta=0.0)
    config(tmp_path, loss_type="skew_forward_kl", alpha=0.0)


def test_settings_that_a_loss_does_not_use(tmp_path):
    """One that is given is used, or refused."""
    used = {
        "label_smoothing_factor": {"cross_entropy"},
        "beta": {"jsd"},
        "alpha": {"skew_forward_kl", "skew_reverse_kl"},
        "temperature": {*LOSS_TYPES} - {"cross_entropy"},
    }
    for name, losses in used.items():
        for loss_type in LOSS_TYPES:
            if loss_type in losses:
                config(tmp_path, loss_type=loss_type, **{name: 0.3})
            else:
                with pytest.raises(ValueError, match=f"^{name} is a setting of loss_type .* got 0.3 with {loss_type};"):
                    config(tmp_path, loss_type=loss_type, **{name: 0.3})


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (datasets.Dataset.from_list([{"prompt": "a"}]), "got Dataset of dict; let motab.synthesize_to_file"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list([])}), "got DatasetDict of str"),
        ([{"input_ids": [1]}], "got list of dict"),
        (["a prompt"], r"got list of str; .* or train on motab.Rollouts\(prompts\)"),
        (None, "got NoneType; "),
    ],
)
def test_what_holds_no_trajectories(tmp_path, data, got):
    message = f"a dataset must hold trajectories, or be the file that synthesize_to_file wrote, {got}"
    with pytest.raises(ValueError, match=message):
        motab.MotabTrainer(make_model(3), args=config(tmp_path), train_dataset=data)
    if isinstance(data, list):
        with pytest.raises(ValueError, match=message):
            motab.MotabTrainer(make_model(3), args=config(tmp_path), train_dataset=TRAJECTORIES, eval_dataset=data)


def test_arguments_of_another_trainer(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"args must be a MotabConfig, which takes .*, got TrainingArguments"):
        motab.MotabTrainer(make_model(3), args=args, train_dataset=TRAJECTORIES)


@pytest.mark.parametrize(
    "name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "data_collator", "model_init"]
)
def test_arguments_of_trainer_that_would_change_nothing(tmp_path, name):
    """Or that would be given logits of one token, as those for metrics."""
    with pytest.raises(ValueError, match=f"takes no {name}, got 'mine': "):
        motab.MotabTrainer(make_model(3), args=config(tmp_path), train_dataset=TRAJECTORIES, **{name: "mine"})


@pytest.mark.parametrize(
    ("name", "value"), [("dispatch_batches", True), ("split_batches", True), ("even_batches", False)]
)
@pytest.mark.parametrize("data", [TRAJECTORIES, motab.Rollouts([[1]], motab.OnPolicy(), 9)])
def test_batches_that_are_not_each_process_s_own(tmp_path, tokenizer, data, name, value):
    """They would be of tensors alone, train on repeated rows, or let a process wait for one that has no batch."""
    for accepted in ({name: not value}, {"use_seedable_sampler": False}):
        args = config(tmp_path, accelerator_config=accepted)
        motab.MotabTrainer(make_model(3), args=args, train_dataset=data, processing_class=tokenizer)
    args = config(tmp_path, accelerator_config={name: value})
    with pytest.raises(ValueError, match=f"of its own and of one size, got {name} {value} in accelerator_config; l"):
        motab.MotabTrainer(make_model(3), args=args, train_dataset=data, processing_class=tokenizer)


def test_no_predictions(tmp_path):
    trainer = motab.MotabTrainer(make_model(3), args=config(tmp_path), train_dataset=TRAJECTORIES)
    with pytest.raises(ValueError, match=r"gives no predictions: evaluate\(dataset\) measures the loss"):
        trainer.predict(TRAJECTORIES)


def test_models_by_name(tmp_path):
    """The student in float32, the teacher as it was saved; no training overwrites what it is loaded from."""
    names = [str(tmp_path / name) for name in ("student", "teacher")]
    for seed, name in enumerate(names, 3):
        make_model(seed).bfloat16().save_pretrained(name)
    args = config(tmp_path / "out", loss_type="jsd", max_steps=1)
    trainer = motab.MotabTrainer(*names, args, train_dataset=TRAJECTORIES)
    trainer.train()
    assert (trainer.model.dtype, trainer.teacher_model.dtype) == (torch.float32, torch.bfloat16)
    assert len(list(trainer.model.parameters())) == len(list(make_model(3).parameters()))
    for name in (names[0], names[1] + "/../teacher"):
        with pytest.raises(ValueError, match=r"another folder than those of .*, got .* LlamaForCausalLM was loaded"):
            motab.MotabTrainer(*names, config(name, loss_type="jsd"), train_dataset=TRAJECTORIES)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks it
def test_adapters_by_name(tmp_path):
    """A student with frozen weights; a teacher's folder is not overwritten."""
    base, adapters = str(tmp_path / "base"), str(tmp_path / "adapters")
    make_model(3).save_pretrained(base)
    with_lora(load_model(base), 4, 8, 0.0, "all-linear").save_pretrained(adapters)
    with pytest.raises(ValueError, match=r"a parameter to train, got LlamaForCausalLM with none; .*load_with_adapters"):
        motab.MotabTrainer(adapters, args=config(tmp_path / "out"), train_dataset=TRAJECTORIES)
    with pytest.raises(ValueError, match="output_dir must be another folder"):
        motab.MotabTrainer(base, adapters, config(adapters, loss_type="jsd"), train_dataset=TRAJECTORIES)
    model = load_with_adapters(adapters, train_them=True)
    motab.MotabTrainer(model, args=config(tmp_path / "out", max_steps=1), train_dataset=TRAJECTORIES).train()


def test_a_dataset_that_is_made_already(tmp_path):
    dataset = motab.TrajectoryDataset(TRAJECTORIES, ignore_authors="teacher", max_length=100)
    trainer = motab.MotabTrainer(make_model(3), args=config(tmp_path), train_dataset=dataset, eval_dataset=dataset)
    assert trainer.train_dataset is dataset
    assert trainer.evaluate()["eval_loss"] > 0
    same = config(tmp_path, ignore_authors=["teacher"], max_length=100)
    assert motab.MotabTrainer(make_model(3), args=same, train_dataset=dataset).train_dataset is dataset
    for settings in ({"ignore_authors": ["student"]}, {"max_length": 5}, {"only_correct": True}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"TrajectoryDataset is taken as it is, got {name}: set them when"):
            motab.MotabTrainer(make_model(3), args=config(tmp_path, **settings), train_dataset=dataset)

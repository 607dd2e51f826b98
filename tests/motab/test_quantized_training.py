"""Training of and by models in 4 and 8 bits; the tests run where bitsandbytes is installed."""

import os
import pathlib
import shutil
import warnings

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import tokenizer
from forks import RANKS, run_ranks
from processes_cases import join, message
from test_quantization import TEACHER, asked, logits, needs_bitsandbytes  # noqa: F401, one is a fixture
from test_trainer import StopAt, config, trajectory
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import motab
import motab_kernels as mk
from motab.cli import main
from motab.config import LOSS_TYPES
from motab.models import load_model, load_with_adapters, with_lora

asks_of_checkpointing = pytest.mark.filterwarnings(  # peft does
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
TRAJECTORIES = [
    trajectory(0, [1, 2], [3, 4, 5, 6, 7], ["teacher"] * 5),
    trajectory(1, [8], [9, 1, 11, 10], ["teacher"] * 4),
    trajectory(2, [4, 9], [2, 10, 7], ["teacher"] * 3),
]


def save_model(folder, seed):
    """Of a width that bitsandbytes reads on a CPU, and with a head of its own."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 12, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    settings = LlamaConfig(**sizes, **ends, num_attention_heads=2, initializer_range=0.2, max_position_embeddings=64)
    LlamaForCausalLM(settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_model(folder / "student", 1), save_model(folder / "teacher", 2)


def definition(student, teacher, loss_type, tokens):
    """The mean over all tokens of the targets."""
    losses = []
    for t in TRAJECTORIES:
        ids = torch.tensor([t.prompt_ids + t.token_ids])
        with torch.no_grad():
            rows = [model(ids).logits[:, len(t.prompt_ids) - 1 : -1].float() for model in (student, teacher)]
        if loss_type == "cross_entropy":
            losses.append(-rows[0][0].log_softmax(-1).gather(-1, ids[0, len(t.prompt_ids) :, None]).sum())
        else:
            losses.append(mk.divergence_loss(*rows, divergence=loss_type, reduction="none", backend="torch").sum())
    return float(sum(losses)) / tokens


@needs_bitsandbytes
@asks_of_checkpointing
@pytest.mark.parametrize(
    ("loss_type", "head"),
    [*((loss_type, "whole") for loss_type in LOSS_TYPES), ("cross_entropy", "in 4 bits"), ("jsd", "in 4 bits")],
)
def test_losses_by_definition(names, tmp_path, loss_type, head):
    """Of a student with adapters and a teacher, both in 4 bits: from their heads, if these are whole."""
    if head != "whole":
        everything = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])
        folders = [tmp_path / "0", tmp_path / "1"]
        for name, folder in zip(names, folders, strict=True):
            AutoModelForCausalLM.from_pretrained(name, quantization_config=everything).save_pretrained(folder)
        student, teacher = (load_model(str(folder)) for folder in folders)
        assert type(student.lm_head).__name__ == "Linear4bit"
    else:
        student, teacher = (load_model(name, bits=4) for name in names)
    expected = definition(student, teacher, loss_type, 12)
    student = with_lora(student, 4, 8, 0.0, "all-linear")
    args = config(tmp_path / "out", loss_type=loss_type, max_steps=1, logging_steps=1, per_device_train_batch_size=3)
    other = None if loss_type == "cross_entropy" else teacher
    trainer = motab.MotabTrainer(student, other, args, train_dataset=TRAJECTORIES)
    assert trainer.fuses_head == (head == "whole")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert {x.dtype for x in student.parameters() if x.requires_grad} == {torch.float32}


@needs_bitsandbytes
@asks_of_checkpointing
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_learn(names, tmp_path, bits, dtype):
    """And go on from a checkpoint as if nothing had been; they load beside the same weights."""

    def train(folder, stop=None, resume=None):
        torch.manual_seed(5)
        student = with_lora(load_model(names[0], dtype, bits=bits), 4, 8, 0.0, "all-linear")
        settings = {"per_device_train_batch_size": 3, "max_steps": 20, "learning_rate": 0.02, "logging_steps": 1}
        saving = {"save_strategy": "steps", "save_steps": 10} if stop or resume else {}
        teacher = load_model(names[1], bits=bits)
        args = config(folder, **settings, **saving, loss_type="forward_kl")
        trainer = motab.MotabTrainer(student, teacher, args, train_dataset=TRAJECTORIES)
        if stop:
            trainer.add_callback(StopAt(stop))
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, losses = train(tmp_path / "at once")
    assert losses[-1] < 0.5 * losses[0]
    train(tmp_path / "halves", stop=10)
    again, _ = train(tmp_path / "halves", resume=True)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_model(str(tmp_path / "at once"), dtype, bits=bits)), logits(model.eval()))


@needs_bitsandbytes
@asks_of_checkpointing
def test_training_by_the_command(tmp_path, capsys, asked):  # noqa: F811
    tokens = AutoTokenizer.from_pretrained(TEACHER).encode("1 + 2 = 3")
    path, out = tmp_path / "t.jsonl", tmp_path / "model"
    path.write_text(trajectory(0, tokens[:2], tokens[2:], ["teacher"] * (len(tokens) - 2)).to_json() + "\n")
    command = ["train", "--model_name_or_path", TEACHER, "--train_file", str(path), "--use_cpu", "--report_to", "none"]
    command += ["--max_steps", "2", "--save_steps", "1", "--output_dir", str(out)]
    flags = ["--load_in_4bit", "--use_peft", "--loss_type", "jsd", "--teacher_model_name_or_path", TEACHER]
    assert main([*command, *flags, "--teacher_load_in_8bit"]) == 0
    assert asked == [4, 8]
    assert not (out / "model.safetensors").exists()
    assert main([*command, *flags, "--teacher_load_in_8bit"]) == 0
    assert "already trained with these settings" in capsys.readouterr().out
    assert main([*command, *flags, "--teacher_load_in_4bit"]) == 2
    assert "(teacher: other weights, teacher_bits: 8 there, 4 now)" in capsys.readouterr().err
    assert main([*command, *flags[1:], "--teacher_load_in_8bit"]) == 2
    assert "(bits: 4 there, not set now, student: other weights)" in capsys.readouterr().err
    again = [str(out) if part == TEACHER else part for part in command[:-1]]
    assert main([*again, str(tmp_path / "again"), "--load_in_4bit", "--use_peft"]) == 0
    assert asked[-1] == 4
    assert (tmp_path / "again" / "adapter_config.json").exists()


@needs_bitsandbytes
@asks_of_checkpointing
def test_weights_that_are_too_coarse(tmp_path, capsys, monkeypatch):
    """Those of a model, and those below adapters: refused before the teacher is loaded."""
    model = load_model(TEACHER, bits=4)
    with pytest.raises(
        ValueError, match=r"weights in few bits \(bitsandbytes\) are too coarse .* got Qwen3ForCausalLM"
    ):
        motab.MotabTrainer(model, args=config(tmp_path), train_dataset=TRAJECTORIES)
    saved, adapters, path = str(tmp_path / "saved"), str(tmp_path / "adapters"), tmp_path / "t.jsonl"
    model.save_pretrained(saved)
    with_lora(load_model(saved), 4, 8, 0.0, "all-linear").save_pretrained(adapters)
    for folder in (saved, adapters):
        AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder)
    loaded = []
    monkeypatch.setattr("motab.cli.load_model", lambda name, *_, **__: loaded.append(name) or load_model(name))
    path.touch()
    for name, named in ((saved, "give it some (--use_peft, "), (adapters, "go on with the adapters (--use_peft")):
        command = ["train", "--model_name_or_path", name, "--train_file", str(path), "--use_cpu", "--loss_type", "jsd"]
        assert main([*command, "--teacher_model_name_or_path", TEACHER]) == 2
        assert named in capsys.readouterr().err
    assert loaded == [saved]
    with pytest.raises(ValueError, match=r"adapters' is quantised already"):
        load_model(adapters, bits=4)
    assert load_with_adapters(adapters, train_them=True).get_base_model().is_loaded_in_4bit


# Two processes.


def train_few(folder, bits, teacher_bits, data=TRAJECTORIES * 2, **sharding):
    """Losses, with student and teacher in so many bits; what is sharded of each."""
    torch.manual_seed(5)
    student, teacher = (
        load_model(str(folder / name), "float32", bits=few, on_cpu=True)
        for name, few in (("student", bits), ("teacher", teacher_bits))
    )
    student = with_lora(student, 4, 8, 0.0, "all-linear") if bits else student
    settings = {"loss_type": "jsd", "max_steps": 3, "logging_steps": 1, "learning_rate": 0.02, "optim": "sgd"}
    args = config(folder / "out", **settings, per_device_train_batch_size=1, **sharding)
    trainer = motab.MotabTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer.__wrapped__())
    trainer.train()
    assert trainer.fuses_head
    parts = [any(isinstance(x, DTensor) for x in each.parameters()) for each in (trainer.model, trainer.teacher_model)]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], parts


CASES = [(4, None), (4, 4), (None, 4), (None, 8)]


def train_by_two(rank, count, folder):
    warnings.filterwarnings("ignore", "Found 14 non-floating frozen Params4bit")  # whole in each process
    join(rank, count, folder)
    found = {("together", case): train_few(folder, *case) for case in CASES}
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # see test_processes.train_sharded
    sharding = {"fsdp": True, "fsdp_config": {"version": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
        found |= {("sharded", case): train_few(folder, *case, **sharding) for case in CASES}
        found["8 bits"] = message(train_few, folder, 8, None, **sharding)
        prompts = motab.Rollouts([[1, 2], [3], [4, 5, 6], [7]], max_new_tokens=9)
        found["rollouts"] = train_few(folder, None, 4, prompts, **sharding)
    torch.save(found, folder / f"{rank}.pt")


@needs_bitsandbytes
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed here")
def test_training_by_two_processes(names, tmp_path):
    """With FSDP2 as without, which shards what is not in 4 bits of the student, and nothing of such a teacher."""
    for name in names:
        shutil.copytree(name, tmp_path / pathlib.Path(name).name)
    codes, written = run_ranks(tmp_path, train_by_two)
    assert codes == {"train_by_two": [0] * RANKS}, written
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for case in CASES:
            (together, _), (sharded, parts) = found["together", case], found["sharded", case]
            assert sharded == pytest.approx(together, rel=1e-4)
            assert parts == [True, case[1] is None]
        assert "FSDP2 cannot shard weights in 8 bits, got PeftModelForCausalLM" in found["8 bits"]
        losses, parts = found["rollouts"]
        assert len(losses) == 3
        assert parts == [True, False]

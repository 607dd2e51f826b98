"""Models in 4 and 8 bits, and those that were saved so; most tests run where bitsandbytes is installed."""

import json
import os
import pathlib
import shutil
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import tokenizer
from processes_cases import RANKS, finish, join, message, start
from test_cli import TASK, TINY
from test_trainer import StopAt, config, trajectory
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
)

import motab
import motab_kernels as mk
from motab.arguments import SynthesizeArguments
from motab.cli import main
from motab.config import LOSS_TYPES
from motab.fingerprint import hash_of_weights
from motab.models import load_model, load_with_adapters, with_lora
from motab.parsing import parse
from motab.pass_time import PassTime
from motab.quantization import loading, method

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
asks_of_checkpointing = pytest.mark.filterwarnings(  # peft does
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
TEACHER = str(TINY / "teacher")
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


@pytest.fixture
def asked(monkeypatch):
    """The bits in which models are asked for, in order."""
    found = []
    monkeypatch.setattr(
        "motab.models.quantization.loading", lambda name, bits: found.append(bits) or loading(name, bits)
    )
    return found


def logits(model):
    ids = torch.tensor([[20, 30, 41, 52, 20, 63, 11, 45]]) % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits.float()


@needs_bitsandbytes
def test_what_has_few_bits():
    """The linear layers but the head, which compute in the dtype of the rest; and the fewer bits, the further off."""
    whole = logits(load_model(TEACHER)).log_softmax(-1)
    errors, sizes = [], []
    for bits in (8, 4):
        for dtype in ("float32", "bfloat16"):
            model = load_model(TEACHER, dtype, bits=bits)
            assert {x.dtype for x in model.parameters()} == {model.dtype, {8: torch.int8, 4: torch.uint8}[bits]}
            assert str(model.dtype) == f"torch.{dtype}"
            layer, head = model.model.layers[0].mlp.up_proj, model.lm_head
            assert (type(layer).__name__, type(head)) == ({8: "Linear8bitLt", 4: "Linear4bit"}[bits], torch.nn.Linear)
            assert getattr(layer, "compute_dtype", model.dtype) == model.dtype
            assert model.training is False
        errors.append(float((whole.exp() * (whole - logits(model).log_softmax(-1))).sum(-1).mean()))
        sizes.append(layer.weight.nbytes)
    assert 0 < errors[0] < 0.02 < errors[1] < 0.2
    assert sizes == [128 * 512, 128 * 512 // 2]


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_a_token_is_multiplied_by_every_weight(bits):
    """Though two of 4 bits are packed into a number; and few bytes are read."""
    few, whole = (PassTime(load_model(TEACHER, bits=bits)).dense for bits in (bits, None))
    assert few.number == whole.number
    assert few.bytes < whole.bytes


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_a_look_at_the_weights_changes_none(bits):
    model = load_model(TEACHER, bits=bits)
    known, before = hash_of_weights(model), logits(model)
    assert hash_of_weights(model) == known
    assert torch.equal(logits(model), before)


@needs_bitsandbytes
def test_a_pass_without_gradient_leaves_the_next_its_own():
    model = load_model(TEACHER, bits=4)
    logits(model)
    states = torch.randn(2, 128, requires_grad=True)
    model.eval().model.layers[0].mlp.up_proj(states).sum().backward()
    assert states.grad.abs().min() > 0


@needs_bitsandbytes
def test_a_width_that_a_cpu_reads_wrongly():
    with pytest.raises(ValueError, match=r"multiple of 64 inputs, got 96 in model.layers.0.*; take 8 bits, or a GPU"):
        load_model(TINY / "student", bits=4)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_saved_in_few_bits_loads_as_it_is(bits, tmp_path):
    model = load_model(TEACHER, bits=bits)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert method(again) == method(model) == "bitsandbytes"
    assert hash_of_weights(again) == hash_of_weights(model)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"is quantised already \(by bitsandbytes\), got 4 bits; leave these out"):
        load_model(str(tmp_path), bits=4)
    with pytest.raises(
        ValueError, match=r"bitsandbytes quantises cannot be split among processes, got .* to be shared"
    ):
        load_model(str(tmp_path), shared=True)


@needs_bitsandbytes
def test_no_line_is_logged_at_each_pass(caplog):
    logits(load_model(TEACHER, bits=8))
    assert "inputs will be cast" not in caplog.text


@needs_bitsandbytes
def test_synthesis_and_evaluation(tmp_path, capsys, asked):
    """The commands load what the flags say, and a run is continued with the same bits alone."""
    task = ["--dataset_name", TASK, "--max_new_tokens", "24"]
    pair = ["--model_name_or_path", str(TINY / "student"), "--teacher_model_name_or_path", TEACHER]
    command = ["synthesize", *pair, *task, "--output_dir", str(tmp_path), "--load_in_8bit"]
    assert main([*command, "--teacher_load_in_4bit"]) == 0
    assert asked == [8, 4]
    assert main([*command, "--teacher_load_in_4bit"]) == 0
    assert main(["verify", "--output_dir", str(tmp_path)]) == 0
    capsys.readouterr()
    for flags, named in (
        (["--teacher_load_in_8bit"], "(teacher: other weights)"),
        ([], "(teacher: other weights, teacher quantized by: 'bitsandbytes' there, None now)"),
    ):
        assert main([*command, *flags]) == 2
        assert named in capsys.readouterr().err
    figures = tmp_path / "figures.json"
    measure = ["evaluate", "--model_name_or_path", TEACHER, *task, "--output_file", str(figures)]
    assert main([*measure, "--max_new_tokens", "140", "--temperature", "0", "--load_in_8bit"]) == 0
    found = json.loads(figures.read_text())
    assert (found["accuracy"], found["settings"]["load_in_8bit"], asked[-1]) == (1.0, True, 8)


def test_flags():
    args = parse(SynthesizeArguments, ["--load_in_8bit", "--teacher_load_in_4bit"], "synthesize")
    assert (args.bits(), args.bits("teacher_")) == (8, 4)
    assert parse(SynthesizeArguments, [], "synthesize").bits() is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--load_in_4bit"], "--load_in_4bit loads weights that are too coarse to be trained; give --use_peft"),
        (["--load_in_4bit", "--load_in_8bit"], "give one of --load_in_4bit and --load_in_8bit, got both"),
        (
            ["--teacher_load_in_4bit", "--teacher_load_in_8bit"],
            "one of --teacher_load_in_4bit and --teacher_load_in_8bi",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_flags_that_are_refused_before_anything_is_loaded(flags, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("motab.cli.load_tokenizer", None)
    (tmp_path / "t.jsonl").touch()
    assert main(["train", "--model_name_or_path", "x", "--train_file", str(tmp_path / "t.jsonl"), *flags]) == 2
    assert named in capsys.readouterr().err


def test_what_is_missing(tmp_path, monkeypatch):
    """bitsandbytes, or what another kind of checkpoint takes."""
    with pytest.raises(ValueError, match=r"bits must be one of 4, 8, or None for whole weights, got 3"):
        load_model(TEACHER, bits=3)
    monkeypatch.setattr("motab.quantization.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^models in 4 or 8 bits need the package bitsandbytes: pip install bitsandb"):
        load_model(TEACHER, bits=4)
    if find_spec("gptqmodel") is None:
        shutil.copytree(TEACHER, tmp_path / "gptq")
        settings = json.loads((tmp_path / "gptq" / "config.json").read_text())
        settings["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        (tmp_path / "gptq" / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=r"a package is missing for '.*gptq' as a language model: .*pip install"):
            load_model(str(tmp_path / "gptq"))


@pytest.mark.parametrize("of_text", [False, True])
def test_of_a_model_that_sees_images(tmp_path, of_text):
    """Wherever its config says so."""
    Gemma3Config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    (settings["text_config"] if of_text else settings)["quantization_config"] = {"quant_method": "awq", "bits": 4}
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"is quantised already \(by awq\), got 8 bits"):
        load_model(str(tmp_path), bits=8)


@needs_bitsandbytes
def test_what_cannot_be_shared():
    with pytest.raises(
        ValueError, match=r"cannot be split among processes, got .* to be shared; load it whole in each"
    ):
        load_model(TEACHER, bits=4, shared=True)


# Training.


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
def test_training_by_the_command(tmp_path, capsys, asked):
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
    codes, written = finish([start(rank, RANKS, tmp_path, train_by_two) for rank in range(RANKS)])
    assert codes == [0] * RANKS, written
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


if __name__ == "__main__":
    train_by_two(int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]))

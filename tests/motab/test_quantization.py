"""Models in 4 and 8 bits, and those that were saved so; most tests run where bitsandbytes is installed."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from test_cli import TASK, TINY
from transformers import Gemma3Config

from motab.arguments import SynthesizeArguments
from motab.cli import main
from motab.fingerprint import hash_of_weights
from motab.models import load_model
from motab.parsing import parse
from motab.pass_time import PassTime
from motab.quantization import loading, method

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
TEACHER = str(TINY / "teacher")


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

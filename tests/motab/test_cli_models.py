"""The models that the commands load and compile."""

import importlib.util
import pathlib

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from motab.cli import main
from motab.models import load_model

TINY = pathlib.Path(__file__).parents[2] / "examples" / "tiny"
TASK = "reasoning-gym:chain_sum?size=6&seed=5&min_terms=4&max_terms=6&min_digits=2&max_digits=2"


@pytest.mark.parametrize(
    "command",
    [
        ["synthesize", "--torch_compile"],
        ["evaluate", "--torch_compile"],
        ["train", "--rollout_torch_compile", "true", "--use_cpu", "--report_to", "none", "--loss_type", "jsd"],
    ],
    ids=lambda command: command[0],
)
def test_compiled_models_and_pages_are_asked_for(command, tmp_path, capsys, monkeypatch):
    def compiled(model, batch_size, max_length, vocab_size, pages, block_size):
        raise ValueError(f"it would be compiled, with {pages.num_pages} pages")

    monkeypatch.setattr("motab.engine.CompiledWriter", compiled)
    pair = ["--model_name_or_path", str(TINY / "student"), "--teacher_model_name_or_path", str(TINY / "teacher")]
    options = [
        "--dataset_name",
        TASK,
        "--max_new_tokens",
        "140",
        "--max_cached_tokens",
        "600",
        *(["--output_dir", str(tmp_path)] if command[0] != "evaluate" else []),
    ]
    assert main([*command, *pair[: 2 if command[0] == "evaluate" else 4], *options]) == 2
    assert "it would be compiled, with 9 pages" in capsys.readouterr().err


@pytest.fixture(scope="module")
def half_teacher(tmp_path_factory):
    """The teacher, saved in bfloat16."""
    folder = tmp_path_factory.mktemp("teacher")
    AutoTokenizer.from_pretrained(TINY / "teacher").save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(TINY / "teacher", dtype="bfloat16").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["synthesize"], ["float32 eager", "bfloat16 eager"]),
        (["evaluate"], ["float32 eager"]),
        (["train"], ["float32 eager", "bfloat16 eager"]),
        (["train", "--dtype", "bfloat16", "--teacher_dtype", "float32"], ["bfloat16 eager", "float32 eager"]),
    ],
    ids=["synthesize", "evaluate", "train", "train otherwise"],
)
def test_how_models_are_loaded(command, expected, half_teacher, tmp_path, monkeypatch):
    """And that a student in float32 works with a teacher in bfloat16, in writing and in training."""
    loaded = []

    def load(*arguments, **settings):
        model = load_model(*arguments, **settings)
        loaded.append(f"{model.dtype} {model.config._attn_implementation}".removeprefix("torch."))
        return model

    monkeypatch.setattr("motab.cli.load_model", load)
    flags = ["--model_name_or_path", str(TINY / "student"), "--dataset_name", TASK, "--max_new_tokens", "8"]
    if command[0] != "evaluate":
        flags += ["--teacher_model_name_or_path", half_teacher, "--output_dir", str(tmp_path / "out")]
    if command[0] == "train":
        flags += ["--loss_type", "jsd", "--max_steps", "1", "--report_to", "none", "--use_cpu", "--save_strategy", "no"]
    assert main([*command, *flags, "--attn_implementation", "eager"]) == 0
    assert loaded == expected


def test_models_by_short_names_of_dtypes():
    assert str(load_model(TINY / "student", "bf16").dtype) == "torch.bfloat16"
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'float8'"):
        load_model(TINY / "student", "float8")


@pytest.mark.parametrize("name", ["bogus", "flash_attention_2"])
def test_an_attention_that_is_not_there(name, capsys):
    if importlib.util.find_spec("flash_attn") and name == "flash_attention_2":
        pytest.skip("it is there")
    command = ["evaluate", "--model_name_or_path", str(TINY / "student"), "--dataset_name", TASK]
    assert main([*command, "--attn_implementation", name]) == 2
    assert f"language model to be loaded with attn_implementation '{name}'" in capsys.readouterr().err

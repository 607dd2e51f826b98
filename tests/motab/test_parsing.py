"""Settings from a YAML file, as the flags give them, and what is refused."""

import pytest

import motab
from motab.arguments import EvaluateArguments, SynthesizeArguments, TrainArguments
from motab.parsing import parse
from motab.yaml_values import load_yaml


@pytest.fixture
def of_file(tmp_path):
    """Parse settings of a file, of `motab synthesize` or of `motab train`."""

    def of_file(text, kinds=SynthesizeArguments):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return parse(kinds, ["--config", str(path)], "some")

    return of_file


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-9", 1e-9), ("-1E+9", -1e9), (".5e3", 500.0), ("2.e3", 2000.0), ("1.5", 1.5), ("3", 3), ("e9", "e9")],
)
def test_numbers(text, value):
    found = load_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr_scheduler_kwargs: {min_lr: 1e-9}", "lr_scheduler_kwargs", {"min_lr": 1e-9}),
        ("lr_scheduler_kwargs: '{\"min_lr\": 1e-9}'", "lr_scheduler_kwargs", {"min_lr": 1e-9}),
        ("lr_scheduler_kwargs: null", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("num_train_epochs: 2", "num_train_epochs", 2.0),
        ("adam_epsilon: 1e-7", "adam_epsilon", 1e-7),
        ("ignore_authors: flawed", "ignore_authors", ["flawed"]),
        ("ignore_authors: [flawed, stitch]", "ignore_authors", ["flawed", "stitch"]),
        ("ignore_authors: []", "ignore_authors", []),
        ("save_strategy: 'no'", "save_strategy", "no"),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("loss_type: jsd", "loss_type", "jsd"),
        ("tf32: false", "tf32", False),
        ("fsdp: true", "fsdp", True),
        ("fsdp: false", "fsdp", None),
        ("optim_args: 5", "optim_args", "5"),
    ],
)
def test_settings_of_a_training(of_file, text, name, value):
    _, config = of_file(text, (TrainArguments, motab.MotabConfig))
    found = getattr(config, name)
    assert (found, type(found)) == (value, type(value)) or (name == "save_strategy" and found == value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_new_tokens: null", "max_new_tokens must be a whole number, got null"),
        ("max_new_tokens: 60.5", "max_new_tokens must be a whole number, got 60.5"),
        ("max_new_tokens: [60]", r"max_new_tokens must be a whole number, got \[60\]"),
        ("max_new_tokens: many", "max_new_tokens must be a whole number, got 'many'"),
        ("max_cached_tokens: true", "max_cached_tokens must be a whole number, got True"),
        ("temperature: {a: 1}", "temperature must be a number, got {'a': 1}"),
        ("torch_compile: 7", "torch_compile must be true or false, got 7"),
        ("stitch: false", "stitch must be a text, got False"),
        ("policy: relay", "policy must be one of motab, on_policy, .*, truncated, got 'relay'"),
        ("words: [[a]]", r"words must be a text or a list of it, got \[\['a'\]\]"),
        ("chat_template_kwargs: [a]", r"chat_template_kwargs must be a text or a mapping, got \['a'\]"),
        ("num_sample: 2", r"must hold settings of motab some, got num_sample \(did you mean num_samples\?\)"),
        ("7: 2", "must hold settings of motab some, got 7; see motab some --help"),
        ("[a]", "must hold settings of motab some, got list; see"),
    ],
)
def test_what_a_file_cannot_say(of_file, text, message):
    with pytest.raises(ValueError, match=f"config.yaml:? {message}") as error:
        of_file(text)
    assert "\n" not in str(error.value)


def test_a_single_author_is_a_list_of_one(tmp_path):
    assert motab.MotabConfig(output_dir=str(tmp_path), ignore_authors="flawed").ignore_authors == ["flawed"]
    with pytest.raises(ValueError, match=r"ignore_authors must be among .*, got nobody"):
        motab.MotabConfig(output_dir=str(tmp_path), ignore_authors="nobody")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_sample", "2"], r"unknown flag --num_sample \(did you mean --num_samples\?\); see motab some --help"),
        (
            ["--max-new-token=2", "-top_k"],
            r"unknown flag --max-new-token \(did you mean --max_new_tokens\?\), -top_k \(did you",
        ),
        (["--xyzzyx"], "unknown flag --xyzzyx; see motab some --help"),
        (["--system_prompt", "Be", "brief", "-1"], "no flag takes 'brief', '-1'; quote a text with spaces"),
        (
            ["--max_new_tokens", "60.5"],
            r"argument --max_new_tokens.*: invalid int value: '60.5'; see motab some --help",
        ),
        (["--seed"], "argument --seed: expected one argument"),
    ],
)
def test_what_flags_cannot_say(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(EvaluateArguments, flags, "some")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--max_completion_length", " (did you mean --max_new_tokens?)"),
        ("--torch_dtype", " (did you mean --dtype?)"),
        ("--warmup_ratio", " (did you mean --warmup_steps?)"),
        ("--group_by_length", " (did you mean --train_sampling_strategy?)"),
        ("--lr", " (did you mean --learning_rate?)"),
        ("--dataset", " (did you mean --dataset_name?)"),
        ("--model_name", " (did you mean --model_name_or_path?)"),
        ("--use_vllm", ""),
        ("--packing", ""),
    ],
)
def test_flags_of_trl(given, meant):
    """A flag is named that does the same; none rather than one whose letters are similar."""
    with pytest.raises(ValueError, match="unknown flag") as error:
        parse((TrainArguments, motab.MotabConfig), [given, "1"], "train")
    assert str(error.value) == f"unknown flag {given}{meant}; see motab train --help"


def test_numbers_in_settings_of_a_template():
    args = parse(EvaluateArguments, ["--chat_template_kwargs", "{a: 1e-3}"], "some")
    assert args.prompt_format().chat_template_kwargs == {"a": 1e-3}


def test_the_last_config_counts(tmp_path):
    """As the last of any other flag."""
    for name, number in (("a", 3), ("b", 4)):
        (tmp_path / name).write_text(f"num_samples: {number}\n")
    first, last = (str(tmp_path / name) for name in "ab")
    for arguments in (["--config", first, "--config", last], [f"--config={first}", f"--config={last}"]):
        assert parse(SynthesizeArguments, arguments, "some").num_samples == 4


@pytest.mark.parametrize("flag", ["grade", "rollout_torch_compile"])
def test_switches_that_need_no_value(flag):
    """Also those that are not set unless given."""
    for arguments, value in ([], None), ([f"--{flag}"], True), ([f"--{flag}", "false"], False):
        args, _ = parse((TrainArguments, motab.MotabConfig), arguments, "train")
        assert getattr(args, flag) is value

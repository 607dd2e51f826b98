"""The settings of the commands as policies and dtypes."""

import pathlib

import pytest

import motab
from motab.arguments import EvaluateArguments, SynthesizeArguments, TrainArguments
from motab.parsing import parse


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ([], motab.MotabPolicy()),
        (["--stitch", "", "--max_interventions", "3"], motab.MotabPolicy(stitch=None, max_interventions=3)),
        (["--policy", "on_policy", "--delimiter", "."], motab.OnPolicy(".")),
        (["--policy", "teacher_only"], motab.TeacherOnly()),
        (["--policy", "step_skd", "--gamma", "0.5"], motab.StepSKD(0.5)),
        (["--policy", "token_skd"], motab.TokenSKD(25)),
        (["--policy", "token_skd", "--teacher_top_k", "9", "--top_k", "20"], motab.TokenSKD(9)),
        (["--policy", "adaswitch", "--factor", "3", "--window", "20"], motab.AdaSwitch(3.0, 20)),
        (["--policy", "relay_opd", "--words", "wait", "so"], motab.RelayOPD(words=("wait", "so"))),
        (["--policy", "truncated", "--n", "64"], motab.Truncated(64)),
    ],
)
def test_policies_by_flags(flags, policy):
    assert parse(SynthesizeArguments, flags, "synthesize").make_policy() == policy


def test_the_papers_recipe():
    """Its files hold settings that there are, and those of the paper."""
    folder = pathlib.Path(__file__).parents[2] / "examples" / "limo"
    write = parse(SynthesizeArguments, ["--config", str(folder / "synthesize.yaml")], "synthesize")
    assert write.make_policy() == motab.MotabPolicy(epsilon0=0.2, theta=1.0, stitch="However,", delimiter=".\n\n")
    assert (write.num_samples, write.temperature, write.max_new_tokens) == (5, 0.6, 32768)
    assert write.prompt_format().prompt_suffix.endswith("within \\boxed{}.")
    train, config = parse((TrainArguments, motab.MotabConfig), ["--config", str(folder / "train.yaml")], "train")
    assert train.train_file == f"{write.output_dir}/trajectories.jsonl"
    assert (config.loss_type, config.learning_rate, config.num_train_epochs) == ("cross_entropy", 5e-5, 6)
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6}
    measure = parse(EvaluateArguments, ["--config", str(folder / "evaluate.yaml")], "evaluate")
    assert measure.model_name_or_path == config.output_dir
    assert measure.prompt_format() == write.prompt_format()


@pytest.mark.parametrize(
    ("written", "flags", "policy"),
    [
        ("stitch: null", [], motab.MotabPolicy(stitch=None)),
        ("stitch: null", ["--stitch", "But"], motab.MotabPolicy(stitch="But")),
        ("epsilon0: null\nentropy_top_k: null", [], motab.MotabPolicy()),
        ("policy: null\nwords: null", [], motab.MotabPolicy()),
    ],
)
def test_null_in_a_file(tmp_path, written, flags, policy):
    path = tmp_path / "config.yaml"
    path.write_text(written)
    assert parse(SynthesizeArguments, ["--config", str(path), *flags], "synthesize").make_policy() == policy


@pytest.mark.parametrize("name", ["bogus", "[motab]"])
def test_an_unknown_policy_in_a_file(tmp_path, name):
    path = tmp_path / "config.yaml"
    path.write_text(f"policy: {name}")
    with pytest.raises(ValueError, match=r"policy must be one of motab, on_policy, .* got .*(bogus|\['motab'\])"):
        parse(SynthesizeArguments, ["--config", str(path)], "synthesize").make_policy()


def test_settings_of_sampling():
    """By the names of transformers' in each command that writes."""
    flags = ["--top_k", "20", "--top_p", "0.95", "--min_p", "0.1"]
    expected = {"top_k": 20, "top_p": 0.95, "min_p": 0.1}
    for kind in (SynthesizeArguments, EvaluateArguments):
        given = parse(kind, flags, "synthesize").generation()
        assert {name: given[name] for name in expected} == expected
    rollouts = parse(TrainArguments, flags, "train").rollouts(["a"])
    assert {name: getattr(rollouts, name) for name in expected} == expected


def test_a_policy_that_lacks_a_setting():
    with pytest.raises(ValueError, match="give --factor and --window"):
        parse(SynthesizeArguments, ["--policy", "adaswitch"], "synthesize").make_policy()


@pytest.mark.parametrize(
    ("kind", "name"), [(SynthesizeArguments, "dtype"), (TrainArguments, "dtype"), (TrainArguments, "teacher_dtype")]
)
def test_names_of_dtypes(kind, name):
    for given, full in [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("auto", "auto")]:
        assert getattr(parse(kind, [f"--{name}", given], "some"), name) == full
    message = "dtype must be one of auto, float32, bfloat16, float16, or fp32, bf16, fp16 for short, got 'half'"
    with pytest.raises(ValueError, match=message):
        parse(kind, [f"--{name}", "half"], "some")

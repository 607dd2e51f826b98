"""The commands on the tiny pair, from synthesis to report, and what they refuse."""

import itertools
import json
import pathlib
import re

import pytest
from transformers import AutoTokenizer

import motab
from motab.cli import main
from motab.config import SynthesizeArguments, parse

TINY = pathlib.Path(__file__).parents[2] / "examples" / "tiny"
TASK = "reasoning-gym:chain_sum?size=6&seed=5&min_terms=4&max_terms=6&min_digits=2&max_digits=2"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model_name_or_path: {TINY / 'student'}\nteacher_model_name_or_path: {TINY / 'teacher'}\n"
        f"dataset_name: {TASK}\nmax_new_tokens: 140\nbatch_size: 6\nepsilon0: 0.5\n"
    )
    return str(path)


def test_from_synthesis_to_report(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["synthesize", "--config", config, "--output_dir", str(out), "--num_samples", "2"]) == 0
    trajectories = motab.read_trajectories(out / "trajectories.jsonl")
    assert [t.index for t in trajectories] == list(range(12))
    assert trajectories[0].prompt_ids == trajectories[1].prompt_ids
    assert any(t.breach_step is not None for t in trajectories)
    assert all(r"\boxed{" in t.text for t in trajectories)
    assert main(["verify", "--output_dir", str(out)]) == 0
    assert "12 trajectories, whole and consistent" in capsys.readouterr().out

    breached = next(t for t in trajectories if t.breach_step is not None)
    assert main(["show", "--output_dir", str(out), "--index", str(breached.index)]) == 0
    shown = capsys.readouterr().out
    assert "However," in shown
    assert f"breach, rolled back to step {breached.rollback_step}" in shown

    assert main(["report", "--output_dir", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert '<span class="flawed">' in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")

    model = tmp_path / "model"
    command = ["train", "--model_name_or_path", str(TINY / "student"), "--output_dir", str(model)]
    command += ["--train_file", str(out / "trajectories.jsonl"), "--num_train_epochs", "1", "--report_to", "none"]
    command += ["--use_cpu", "--save_strategy", "no"]
    assert main([*command, "--loss_type", "jsd"]) == 2
    assert "loss_type jsd compares the student with a teacher" in capsys.readouterr().err
    assert main([*command, "--loss_type", "jsd", "--teacher_model_name_or_path", str(TINY / "teacher")]) == 0
    assert main(command) == 0
    figures = tmp_path / "figures.json"
    command = ["evaluate", "--model_name_or_path", str(model), "--dataset_name", TASK, "--max_new_tokens", "140"]
    assert main([*command, "--temperature", "0", "--output_file", str(figures)]) == 0
    printed, warned = capsys.readouterr()
    assert re.search(r"evaluate .* 6/6 .* tok/s", printed)
    assert "ran out of their budget" not in warned
    assert "mean over 1 samples of 6 problems" in printed
    assert "pass@" not in printed
    assert json.loads(figures.read_text())["problems"] == 6
    answers = ["--temperature", "1", "--num_samples", "2", "--answers_file", str(tmp_path / "answers.jsonl")]
    assert main([*command, *answers, "--output_file", str(figures)]) == 0
    passed = json.loads(figures.read_text())["pass_at_k"]
    assert f"mean over 2 samples of 6 problems), pass@2 {passed:.3f}" in " ".join(capsys.readouterr().out.split())
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [(json.loads(line)["index"], json.loads(line)["sample"]) for line in lines] == [
        (index, sample) for index in range(6) for sample in range(2)
    ]


def test_answers_that_run_out_of_budget(capsys):
    command = ["evaluate", "--model_name_or_path", str(TINY / "teacher"), "--dataset_name", TASK, "--temperature", "0"]
    assert main([*command, "--max_new_tokens", "3"]) == 0
    assert "100.0% of the answers ran out of their budget of 3 tokens" in (warned := capsys.readouterr().err)
    assert "raise --max_new_tokens" in warned


def test_verify_finds_a_changed_file(config, tmp_path, capsys):
    assert main(["synthesize", "--config", config, "--output_dir", str(tmp_path)]) == 0
    path = tmp_path / "trajectories.jsonl"
    trajectory = motab.read_trajectories(path)[0]
    trajectory.author.pop()
    path.write_text(trajectory.to_json() + "\n")
    assert main(["verify", "--output_dir", str(tmp_path)]) == 2
    assert "trajectory 0 has" in capsys.readouterr().err


def test_training_as_it_writes(tmp_path, capsys):
    """From problems to a model, and again from its last checkpoint."""
    command = ["train", "--model_name_or_path", str(TINY / "student"), "--output_dir", str(tmp_path / "model")]
    command += ["--teacher_model_name_or_path", str(TINY / "teacher"), "--loss_type", "reverse_kl", "--use_cpu"]
    command += ["--max_new_tokens", "24", "--per_device_train_batch_size", "3", "--report_to", "none"]
    command += ["--save_steps", "1", "--logging_steps", "1", "--num_train_epochs", "1"]
    assert main(command) == 2
    assert "give --train_file, or --dataset_name to write on as it trains" in capsys.readouterr().err
    command += ["--dataset_name", TASK, "--policy", "step_skd"]
    assert main(command) == 2
    assert "give --gamma" in capsys.readouterr().err
    assert main([*command, "--gamma", "0.5", "--max_steps", "1"]) == 0
    assert main([*command, "--gamma", "0.5"]) == 0
    state = json.loads((tmp_path / "model" / "checkpoint-2" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert [(entry["step"], entry["trajectories"]) for entry in steps] == [(1, 3), (2, 3)]
    assert any(entry["teacher_share"] > 0 for entry in steps)


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ([], motab.MotabPolicy()),
        (["--stitch", "", "--max_interventions", "3"], motab.MotabPolicy(stitch=None, max_interventions=3)),
        (["--policy", "on_policy", "--delimiter", "."], motab.OnPolicy(".")),
        (["--policy", "teacher_only"], motab.TeacherOnly()),
        (["--policy", "step_skd", "--gamma", "0.5"], motab.StepSKD(0.5)),
        (["--policy", "token_skd"], motab.TokenSKD(25)),
        (["--policy", "adaswitch", "--factor", "3", "--window", "20"], motab.AdaSwitch(3.0, 20)),
        (["--policy", "relay_opd", "--words", "wait", "so"], motab.RelayOPD(words=("wait", "so"))),
        (["--policy", "truncated", "--n", "64"], motab.Truncated(64)),
    ],
)
def test_policies_by_flags(flags, policy):
    assert parse(SynthesizeArguments, flags, "synthesize").make_policy() == policy


def test_a_policy_that_lacks_a_setting():
    with pytest.raises(ValueError, match="give --factor and --window"):
        parse(SynthesizeArguments, ["--policy", "adaswitch"], "synthesize").make_policy()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--policy", "motab"], "--policy besides"),
        (["--gamma", "0.5"], "--gamma besides"),
        (["--stitch", ""], "--stitch besides"),
        (["--dataset_split", "train"], "--dataset_split besides"),
        (["--rollout_temperature", "0"], "--rollout_temperature besides"),
        (["--max_new_tokens", "1024", "--top_p", "1"], "--max_new_tokens, --top_p besides"),
        (["--rollout_batch_size", "8", "--block_size", "16"], "--rollout_batch_size, --block_size besides"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_settings_of_writing_where_nothing_is_written(tmp_path, capsys, flags, named, in_file):
    """The defaults too: who gives one thinks that something is written."""
    if in_file:
        path = tmp_path / "config.yaml"
        path.write_text(
            "".join(f"{name[2:]}: {value!r}\n" for name, value in zip(flags[::2], flags[1::2], strict=True))
        )
        flags = ["--config", str(path)]
    command = ["train", "--model_name_or_path", str(TINY / "student"), "--output_dir", str(tmp_path / "model")]
    assert main([*command, "--train_file", "none.jsonl", *flags]) == 2
    error = capsys.readouterr().err
    assert f"--train_file is trained on as it was written, got {named}" in error
    assert "leave them out, or give --dataset_name in place of --train_file" in error


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
    def compiled(model, batch_size, max_length, vocab_size, num_pages, block_size):
        raise ValueError(f"it would be compiled, with {num_pages} pages")

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
    assert "it would be compiled, with 2 pages" in capsys.readouterr().err


def test_a_policy_that_hands_back(config, tmp_path, capsys):
    """Several interventions in one trajectory, through the commands that look at it."""
    out = ["--output_dir", str(tmp_path / "run")]
    assert main(["synthesize", "--config", config, *out, "--max_interventions", "4", "--temperature", "1"]) == 0
    trajectories = motab.read_trajectories(tmp_path / "run" / "trajectories.jsonl")
    pieces = [[author for author, _ in itertools.groupby(t.author)] for t in trajectories]
    assert any(authors.count("stitch") > 1 and "student" in authors[authors.index("teacher") :] for authors in pieces)
    assert main(["verify", *out]) == 0
    assert main(["report", *out]) == 0
    assert main(["show", *out]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "."], "no tokenizer found at ."),
        (["--dataset_name", ""], "give --dataset_name, as a flag or in the file"),
        (["--epsilon0", "-1"], "epsilon0"),
        (["--delimiter", ""], "the step delimiter must hold at least one character"),
        (["--max_new_tokens", "100000"], "reads at most"),
        (["--policy", "step_skd"], "--policy step_skd has no epsilon0; it takes gamma, delimiter"),
        (["--gamma", "0.5"], "--policy motab has no gamma; it takes epsilon0, theta"),
    ],
)
def test_refusals_leave_nothing(config, tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    assert main(["synthesize", "--config", config, "--output_dir", str(out), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_tokenizer_without_a_model(config, tmp_path, capsys):
    AutoTokenizer.from_pretrained(TINY / "student").save_pretrained(tmp_path / "bare")
    flags = ["--model_name_or_path", str(tmp_path / "bare"), "--output_dir", str(tmp_path / "run")]
    assert main(["synthesize", "--config", config, *flags]) == 2
    assert "bare' is not a causal language model" in capsys.readouterr().err


def test_unknown_settings_and_commands(config, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("epsilon: 1\n")
    assert main(["synthesize", "--config", str(path)]) == 2
    assert "must hold settings of motab synthesize, got epsilon" in capsys.readouterr().err
    assert main(["fly"]) == 2
    assert "usage: motab COMMAND" in capsys.readouterr().err
    assert main(["show", "--output_dir", str(tmp_path / "none")]) == 2
    assert "does not exist; motab synthesize" in capsys.readouterr().err
    assert main(["synthesize", "--epsilon", "1"]) == 2
    assert "['--epsilon', '1']" in capsys.readouterr().err


def test_tokenizers_that_differ(config, tmp_path, capsys, tokenizer, student):
    tokenizer.save_pretrained(tmp_path / "other")
    student.save_pretrained(tmp_path / "other")
    flags = ["--model_name_or_path", str(tmp_path / "other"), "--output_dir", str(tmp_path / "run")]
    assert main(["synthesize", "--config", config, *flags]) == 2
    assert "must share one tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

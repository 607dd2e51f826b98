"""The commands on the tiny pair, from synthesis to report, and what they refuse."""

import itertools
import json
import pathlib
import re

import pytest
from transformers import AutoTokenizer

import motab
from motab.cli import COMMANDS, main
from motab.data import Problem, load_problems
from motab.models import load_model
from motab.prompts import PromptFormat, encode_prompts
from motab.synthesis import synthesize_to_file

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


def test_from_synthesis_to_report(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # of the console
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
    assert "give --teacher_model_name_or_path" in capsys.readouterr().err
    assert main([*command, "--loss_type", "jsd", "--teacher_model_name_or_path", str(TINY / "teacher")]) == 0
    capsys.readouterr()
    assert main([*command, "--eval_file", str(out / "trajectories.jsonl"), "--eval_strategy", "steps"]) == 0
    assert re.search(r"model: the trained model, held-out loss 0\.\d{4}", capsys.readouterr().out)
    figures = tmp_path / "figures.json"
    command = ["evaluate", "--model_name_or_path", str(model), "--dataset_name", TASK, "--max_new_tokens", "140"]
    assert main([*command, "--temperature", "0", "--output_file", str(figures)]) == 0
    printed, warned = capsys.readouterr()
    assert re.search(r"evaluate .* 6/6 .* tok/s", printed)
    assert "ran out of their budget" not in warned
    assert "mean over 1 samples of 6 problems" in printed
    assert "pass@" not in printed
    found = json.loads(figures.read_text())
    assert found["num_problems"] == 6
    settings = {name: found["settings"][name] for name in ("model_name_or_path", "dataset_name", "temperature")}
    assert settings == {"model_name_or_path": str(model), "dataset_name": TASK, "temperature": 0.0}
    answers = ["--temperature", "1", "--num_samples", "2", "--answers_file", str(tmp_path / "answers.jsonl")]
    assert main([*command, *answers, "--output_file", str(figures)]) == 0
    passed = json.loads(figures.read_text())["pass_at_k"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"mean over 2 samples of 6 problems), pass@2 {passed:.3f}" in printed
    assert " 12/12 " in printed
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [(json.loads(line)["index"], json.loads(line)["sample"]) for line in lines] == [
        (index, sample) for index in range(6) for sample in range(2)
    ]
    assert main([*command, *answers, "--output_file", str(figures / "in_a_file")]) == 2
    printed, error = capsys.readouterr()
    assert "mean over 2 samples of 6 problems" in printed
    assert "File exists" in error


def test_the_bar_begins_at_what_is_there(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    command = ["synthesize", "--config", config, "--output_dir", str(tmp_path / "run"), "--max_new_tokens", "8"]
    assert main(command) == 0
    path = tmp_path / "run" / "trajectories.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for kept in (6, 4):
        path.write_text("".join(lines[:kept]))
        capsys.readouterr()
        assert main(command) == 0
        assert " 6/6 " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["output_file", "answers_file"])
def test_results_into_a_folder_are_refused_before_anything_is_read(tmp_path, capsys, name):
    """After an evaluation they would be lost."""
    command = ["evaluate", "--model_name_or_path", "none", "--dataset_name", "none", f"--{name}", str(tmp_path)]
    assert main(command) == 2
    assert f"--{name} must be a file to write, got the folder" in capsys.readouterr().err


def test_show_finds_a_trajectory_by_its_index(tmp_path, capsys):
    """In an unfinished file the lines are in the order in which trajectories were finished."""
    path = tmp_path / "trajectories.jsonl"
    AutoTokenizer.from_pretrained(TINY / "student").save_pretrained(tmp_path)
    lines = [motab.Trajectory(i, [1], [2], ["student"], "", [], None, None, "eos").to_json() for i in (5, 2)]
    path.write_text(lines[0].replace("[1]", "[20]") + "\n" + lines[1] + "\n")
    assert main(["show", "--output_dir", str(tmp_path), "--index", "5"]) == 0
    five = capsys.readouterr().out
    assert main(["show", "--output_dir", str(tmp_path), "--index", "2"]) == 0
    assert five != capsys.readouterr().out
    assert main(["show", "--output_dir", str(tmp_path), "--index", "0"]) == 2
    assert "of a trajectory in" in (err := capsys.readouterr().err)
    assert "2 from 2 to 5, got 0" in err
    path.write_text(path.read_text() + "a line behind it\n")
    assert main(["show", "--output_dir", str(tmp_path), "--index", "5"]) == 0  # what is behind it is not read


def test_an_interrupted_command(config, tmp_path, capsys, monkeypatch):
    """By Ctrl-C, as a trajectory is written; and one that starts again."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    command = ["synthesize", "--config", config, "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr("motab.progress.Summary.add", interrupt)
        assert main(command) == 130
    assert capsys.readouterr().err == "motab synthesize: interrupted; the same command continues\n"
    assert len(motab.read_trajectories(tmp_path / "run" / "trajectories.jsonl")) == 1
    assert main(command) == 0
    assert "6 trajectories" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("motab.cli.write_report", interrupt)
        assert main(["report", "--output_dir", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "motab report: interrupted\n"


def test_show_prints_digits_of_what_is_small(tmp_path, capsys):
    path = tmp_path / "trajectories.jsonl"
    AutoTokenizer.from_pretrained(TINY / "student").save_pretrained(tmp_path)
    steps = [motab.Step(0, 1, 12345.6789, 2.3456e-5, True), motab.Step(0, 1, 0.0, 0.25, True)]
    path.write_text(motab.Trajectory(0, [1], [2], ["student"], "", steps, None, None, "eos").to_json() + "\n")
    assert main(["show", "--output_dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "step 0: value 12345.679, boundary 2.35e-05, accepted" in shown
    assert "step 1: value 0, boundary 0.250, accepted" in shown


@pytest.mark.parametrize("command", ["synthesize", "train", "evaluate"])
def test_problems_are_put_as_asked(command, tmp_path, capsys, monkeypatch):
    """Each command renders them so, and asks for the configuration."""

    def stop(self, tokenizer, problem):
        raise ValueError(f"put as {self}")

    loaded = []
    load = lambda *given, **columns: loaded.append((given, columns)) or [Problem("b", "1", {})]  # noqa: E731
    monkeypatch.setattr("motab.argument_groups.load_problems", load)
    monkeypatch.setattr("motab.prompts.PromptFormat.render", stop)
    models = ["--model_name_or_path", str(TINY / "student"), "--teacher_model_name_or_path", str(TINY / "teacher")]
    flags = [*models[: 2 if command == "evaluate" else 4], "--dataset_name", "some", "--dataset_config", "main"]
    flags += ["--question_column", "q", "--answer_column", "a"]
    flags += ["--system_prompt", "a", "--prompt_suffix", "b", "--chat_template_kwargs", '{"quiet": true}']
    flags += ["--output_dir", str(tmp_path)] if command != "evaluate" else []
    assert main([command, *flags]) == 2
    assert f"put as {PromptFormat('a', 'b', {'quiet': True})}" in capsys.readouterr().err
    columns = {"question_column": "q", "answer_column": "a"}
    assert loaded == [(("some", "test" if command == "evaluate" else "train", "main"), columns)]


@pytest.mark.parametrize("command", ["synthesize", "train", "evaluate"])
def test_problems_that_are_too_long(command, tmp_path, capsys, monkeypatch):
    """Each command goes on with the others."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    prompts = [PromptFormat().render(tokenizer, problem) for problem in load_problems(TASK)]
    lengths = [len(ids) for ids in encode_prompts(prompts, tokenizer)]
    limit = sorted(lengths)[2]
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= limit]
    assert 0 < len(kept) < len(prompts)

    def stop(*given, **settings):
        raise ValueError(f"with {given[0] if command == 'train' else given[3]}")

    monkeypatch.setattr("motab.evaluation.synthesize", stop)
    monkeypatch.setattr("motab.synthesis.synthesize", stop)
    monkeypatch.setattr("motab.arguments.Rollouts", stop)
    flags = ["--model_name_or_path", str(TINY / "student"), "--dataset_name", TASK, "--max_prompt_length", str(limit)]
    if command != "evaluate":
        flags += ["--teacher_model_name_or_path", str(TINY / "teacher"), "--output_dir", str(tmp_path / "run")]
    with pytest.warns(UserWarning, match=f"{6 - len(kept)} of 6 problems have prompts of more than"):
        assert main([command, *flags]) == 2
    given = encode_prompts(kept, tokenizer) if command == "synthesize" else kept
    assert f"motab {command}: with {given}\n" == capsys.readouterr().err


def test_answers_that_run_out_of_budget(capsys):
    command = ["evaluate", "--model_name_or_path", str(TINY / "teacher"), "--dataset_name", TASK, "--temperature", "0"]
    assert main([*command, "--max_new_tokens", "3"]) == 0
    assert "100.0% of the answers ran out of their budget of 3 tokens" in (warned := capsys.readouterr().err)
    assert "raise --max_new_tokens" in warned


@pytest.mark.parametrize(
    ("last", "named"), [('"answer": null', "row 1 and in 1 of 2"), ('"text": "a"', "row 0 and in 2 of 2")]
)
def test_problems_without_an_answer(last, named, tmp_path, capsys, monkeypatch):
    """Refused before the model is loaded."""
    monkeypatch.setattr("motab.cli.load_model", None)
    path = tmp_path / "problems.jsonl"
    first = '{"question": "a", "answer": "1"}' if "null" in last else '{"question": "a"}'
    path.write_text(f'{first}\n{{"question": "b", {last}}}\n')
    command = ["evaluate", "--model_name_or_path", str(TINY / "student"), "--dataset_name", str(path)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "grading needs an answer to each problem, a text in a column answer or" in error
    assert f"got none in {named} rows in total" in error


def test_verify_finds_a_changed_file(config, tmp_path, capsys):
    assert main(["synthesize", "--config", config, "--output_dir", str(tmp_path)]) == 0
    path = tmp_path / "trajectories.jsonl"
    trajectory = motab.read_trajectories(path)[0]
    trajectory.author.pop()
    path.write_text(trajectory.to_json() + "\n")
    assert main(["verify", "--output_dir", str(tmp_path)]) == 2
    assert "trajectory 0 has" in capsys.readouterr().err


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


def test_a_student_beside_teacher_only(tmp_path, monkeypatch):
    """It is loaded, to draft, and the prompts are the teacher's, whose template it need not have."""
    folder = tmp_path / "student"
    load_model(str(TINY / "student")).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    given = []

    def noting(path, student, *arguments, **settings):
        given.append(student and student.name_or_path)
        return synthesize_to_file(path, student, *arguments, **settings)

    monkeypatch.setattr("motab.cli.synthesize_to_file", noting)
    command = ["synthesize", "--policy", "teacher_only", "--teacher_model_name_or_path", str(TINY / "teacher")]
    command += ["--dataset_name", TASK, "--max_new_tokens", "20"]
    for name, flags in (("alone", []), ("both", ["--model_name_or_path", str(folder)])):
        assert main([*command, *flags, "--output_dir", str(tmp_path / name)]) == 0
    assert given == [None, str(folder)]
    alone, both = (motab.read_trajectories(tmp_path / name / "trajectories.jsonl") for name in ("alone", "both"))
    assert both == alone
    templates = [AutoTokenizer.from_pretrained(path).chat_template for path in (tmp_path / "both", TINY / "teacher")]
    assert templates[0] == templates[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "."], "no tokenizer found at ."),
        (["--dataset_name", ""], "give --dataset_name, as a flag or in the file"),
        (["--epsilon0", "-1"], "epsilon0"),
        (
            ["--num_samples", "0"],
            "--num_samples must be at least 1, and 1 at --temperature 0, where all are equal, got 0",
        ),
        (
            ["--num_samples", "-1"],
            "--num_samples must be at least 1, and 1 at --temperature 0, where all are equal, got -1",
        ),
        (["--num_samples", "2", "--temperature", "0"], "1 at --temperature 0, where all are equal, got 2 at 0.0"),
        (["--delimiter", ""], "the step delimiter must hold at least one character"),
        (["--max_new_tokens", "100000"], "reads at most"),
        (["--policy", "step_skd"], "--policy step_skd has no epsilon0; it takes gamma, delimiter"),
        (["--policy", "token_skd"], "--policy token_skd has no epsilon0; it takes teacher_top_k"),
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys, monkeypatch):
    """Each flag has a text, and a default that says something; our own come before those of transformers."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    ours, title, others = capsys.readouterr().out.partition("TrainingArguments of transformers:")
    assert "(default: None)" not in ours + others
    assert "(default: )" not in ours + others
    pairs = itertools.pairwise([*ours.splitlines(), ""])
    flags = [(line, after) for line, after in pairs if line.startswith("  --")]
    assert [line for line, after in flags if "  " not in line.strip() and not after.startswith(" " * 20)] == []
    assert bool(title) == (command == "train")
    if command == "train":
        assert "--loss_type" in ours
        assert "Rollouts: tokens to write after the prompt, at most. (default: 1024)" in ours
        assert "--adam_beta1" in others


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
    error = capsys.readouterr().err
    assert error == "motab synthesize: unknown flag --epsilon (did you mean --epsilon0?); see motab synthesize --help\n"


def test_tokenizers_that_differ(config, tmp_path, capsys, tokenizer, student):
    tokenizer.save_pretrained(tmp_path / "other")
    student.save_pretrained(tmp_path / "other")
    flags = ["--model_name_or_path", str(tmp_path / "other"), "--output_dir", str(tmp_path / "run")]
    assert main(["synthesize", "--config", config, *flags]) == 2
    assert "must share one tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Grades of trajectories: which answer their problem, and training on these alone."""

import copy
import re

import pytest
from test_cli import TINY
from test_rollouts import POLICIES, SETTINGS
from test_trainer import TRAJECTORIES, config, trajectory

import motab
from motab.cli import main
from motab.dataset import TrajectoryDataset
from motab.summary import figures

TASK = "reasoning-gym:chain_sum?min_terms=4&max_terms=6&min_digits=2&max_digits=2&seed=5&size="
PAIR = ["--model_name_or_path", str(TINY / "student"), "--teacher_model_name_or_path", str(TINY / "teacher")]


def answers_its_problem(t, tokenizer):
    """Straight from the sum in the prompt and the last box in the text."""
    total = eval(re.findall(r"problem: ([\d +-]+) =", tokenizer.decode(t.prompt_ids))[0])
    boxes = re.findall(r"\\boxed\{(-?\d+)\}", t.text)
    return bool(boxes) and int(boxes[-1]) == total


def test_grades_of_a_synthesis(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # of the console
    out = ["--output_dir", str(tmp_path / "run")]
    write = ["synthesize", *PAIR, *out, "--max_new_tokens", "140", "--num_samples", "2", "--dataset_name"]
    path, files = tmp_path / "run" / "trajectories.jsonl", ["--train_file", str(tmp_path / "run/trajectories.jsonl")]
    assert main([*write, f"{TASK}6"]) == 0
    ungraded = motab.read_trajectories(path)
    assert {t.correct for t in ungraded} == {None}
    train = ["train", *PAIR[:2], *files, "--output_dir", str(tmp_path / "model"), "--only_correct", "--use_cpu"]
    train += ["--num_train_epochs", "1", "--save_strategy", "no", "--report_to", "none"]
    assert main(train) == 2
    assert "got trajectory 0 without a grade; run its motab synthesize again with --grade" in capsys.readouterr().err
    assert main([*write, f"{TASK}10", "--grade"]) == 0  # grades the 12 that are there, and 8 new ones
    graded = motab.read_trajectories(path)
    tokenizer = motab.models.load_tokenizer(str(TINY / "student"))
    right = [answers_its_problem(t, tokenizer) for t in graded]
    assert [t.correct for t in graded] == right
    assert 0 < sum(right) < len(right) == 20
    for t, before in zip(graded, ungraded, strict=False):
        t.correct = None
        assert t == before
    share = f"{100 * sum(right) / 20:.1f}%"
    assert main(["report", *out]) == 0
    assert f"right answers {share}" in (tmp_path / "run" / "report.html").read_text()
    capsys.readouterr()
    assert main(["show", *out, "--index", str(right.index(False))]) == 0
    assert "the answer is wrong" in capsys.readouterr().out
    left_out = f"{20 - sum(right)} of 20 trajectories do not answer their problem"
    with pytest.warns(UserWarning, match=left_out):
        assert main(train) == 0
    with pytest.warns(UserWarning, match=left_out):
        assert main(["export", *out, "--output_file", str(tmp_path / "t.jsonl"), "--only_correct"]) == 0
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == sum(right)


def test_only_correct_ones():
    marked = [trajectory(i, t.prompt_ids, t.token_ids, t.author) for i, t in enumerate([*TRAJECTORIES, *TRAJECTORIES])]
    for t, correct in zip(marked, [True, False, True, True], strict=True):
        t.correct = correct
    message = "1 of 4 trajectories have more than max_length 6 tokens and 1 of 4 trajectories do not answer"
    with pytest.warns(UserWarning, match=message):
        kept = TrajectoryDataset([marked[0], marked[1], marked[3], marked[3]], max_length=6, only_correct=True)
    assert list(kept) == [TrajectoryDataset(marked)[3]] * 2
    assert len(TrajectoryDataset(marked)) == 4
    with pytest.raises(ValueError, match="2 of 2 trajectories do not answer their problem: none is left"):
        TrajectoryDataset([marked[1]] * 2, only_correct=True)
    marked[3].correct = None
    with pytest.raises(ValueError, match="got trajectory 3 without a grade"):
        TrajectoryDataset(marked, only_correct=True)
    assert figures(marked)["correct"] == pytest.approx(2 / 3)


def test_the_trainer_takes_only_correct_ones(tmp_path, student):
    for t, correct in zip(TRAJECTORIES, [True, False], strict=True):
        t.correct = correct
    try:
        with pytest.warns(UserWarning, match="1 of 2 trajectories do not answer"):
            trainer = motab.MotabTrainer(
                copy.deepcopy(student), None, config(tmp_path, only_correct=True), train_dataset=TRAJECTORIES
            )
    finally:
        for t in TRAJECTORIES:
            t.correct = None
    assert len(trainer.train_dataset) == 1


def test_rollouts_are_graded_by_the_place_of_their_prompt(tmp_path, student, teacher, tokenizer, prompts):
    seen = []

    def is_right(t, place):
        seen.append((prompts[place], t.prompt_ids))
        return place % 3 == 0

    rollouts = motab.Rollouts(prompts, POLICIES["on-policy"], grade=is_right, **SETTINGS)
    args = config(tmp_path, loss_type="reverse_kl", num_train_epochs=1, logging_steps=1, per_device_train_batch_size=3)
    trainer = motab.MotabTrainer(
        copy.deepcopy(student), teacher, args, train_dataset=rollouts, processing_class=tokenizer
    )
    trainer.train()
    assert len(seen) == len(prompts)
    assert all(prompt == ids for prompt, ids in seen)
    assert [ids for ids, _ in seen] != prompts  # the trainer draws an order
    shares = [entry["correct"] for entry in trainer.state.log_history if "correct" in entry]
    places = [prompts.index(ids) for ids, _ in seen]
    expected = [[place % 3 == 0 for place in places[at : at + 3]] for at in range(0, len(places), 3)]
    assert shares == pytest.approx([sum(marks) / len(marks) for marks in expected])
    args = config(tmp_path, only_correct=True)
    with pytest.raises(ValueError, match="only_correct applies to finished trajectories"):
        motab.MotabTrainer(copy.deepcopy(student), teacher, args, train_dataset=rollouts, processing_class=tokenizer)

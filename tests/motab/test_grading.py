"""Grades of trajectories: which answer their problem, and training on these alone."""

import copy
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_cli import TINY
from test_rollouts import POLICIES, SETTINGS
from test_trainer import TRAJECTORIES, config, trajectory

import motab
from motab.cli import main
from motab.data import Problem, load_problems
from motab.dataset import TrajectoryDataset
from motab.grading import is_correct, stated_answer
from motab.summary import figures

TASK = "reasoning-gym:chain_sum?min_terms=4&max_terms=6&min_digits=2&max_digits=2&seed=5&size="
PAIR = ["--model_name_or_path", str(TINY / "student"), "--teacher_model_name_or_path", str(TINY / "teacher")]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("<answer>\n7 </answer>", "7"),
        ("The answer is 12.\nSo the answer is: -3.5.", "-3.5"),
        (r"The answer is 4. \boxed{5}", "5"),
        (r"\boxed{1}, no: \boxed{\frac{\sqrt{3}}{\sqrt[3]{2}}}", r"\frac{\sqrt{3}}{\sqrt[3]{2}}"),
        (r"\boxed {\{1, \}2\{\}} and", r"\{1, \}2\{\}"),
        (r"\boxed{4}, or rather \boxed{5 (cut", "4"),
        (r"\boxed{4 \boxed{5}}", "5"),
        ("<answer>5</answer> I close it. </answer>", "5"),
        ("I do not know", None),
    ],
)
def test_stated_answer(text, answer):
    assert stated_answer(text) == answer


def test_math_verify_and_the_tasks_own_verifier():
    half = Problem("?", "1/2", {})
    assert is_correct(r"so \boxed{0.5}", half)
    assert is_correct(r"so \boxed{\frac{2}{4}}", half)
    assert not is_correct(r"so \boxed{2}", half)
    (problem,) = load_problems("reasoning-gym:chain_sum?size=1&seed=1")
    assert is_correct(f"\\boxed{{{problem.answer}}}", problem)
    assert not is_correct(f"\\boxed{{{problem.answer}1}}", problem)
    assert not is_correct("nothing", problem)


@pytest.mark.parametrize(
    ("text", "settings", "right"),
    [
        ("<think>Let me count 204 tokens and then", {}, False),
        (r"<think>The answer is \boxed{204}, but let me check", {}, False),
        (r"<think>It is 204.</think>So \boxed{204}", {}, True),
        (r"<think>The answer is \boxed{204}.</think>So it is \boxed{7}.", {}, False),
        (r"<think>1</think>\boxed{204}<think>Or is it 204?", {}, False),
        (r"Hm.</think>So \boxed{204}", {"thinking": True}, True),
        (r"So \boxed{204}", {"thinking": True}, False),
        (r"So \boxed{204}", {}, True),
        (r"Let me see: \boxed{204}, but", {"finish_reason": "length"}, True),
        (r"<think>No.</think>The answer is 204.", {"finish_reason": "length"}, True),
        (r"<think>\boxed{204}</think>We have \boxed{20", {"finish_reason": "length"}, False),
        (r"<answer>7</answer> is not 204", {"finish_reason": "length"}, False),
    ],
)
@pytest.mark.parametrize("task", [False, True], ids=["math-verify", "reasoning-gym"])
def test_thinking_and_budget(text, settings, right, task):
    record = {"answer": "204", "metadata": {"source_dataset": "chain_sum"}} if task else {}
    assert is_correct(text, Problem("?", "204", record), **settings) == right


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("The sum is \\boxed{12}.\n\nHowever,\n\nthe sum is \\boxed{15}.", "15", True),
        ("The sum is \\boxed{12}.\n\nHowever,\n\nthe sum is \\boxed{15}.", "12", False),
        (r"The roots are \boxed{3} and \boxed{5}.", "3, 5", True),
        (r"It is \boxed{\frac{\sqrt{3}}{2}}.", r"\frac{\sqrt{3}}{2}", True),
        ("<answer>6</answer>", "6", True),
        ("The answer is (B).", "B", True),
        ("The answer is 1,234 dollars.", "1234", True),
    ],
)
def test_a_finished_text_is_graded_no_worse_than_a_cut_one(text, gold, right):
    """By its last box, as where the model revised its answer, or by all of them."""
    problem = Problem("?", gold, {})
    assert is_correct(text, problem) == right
    assert right or not is_correct(text, problem, finish_reason="length")


@pytest.mark.parametrize(
    ("stated", "gold", "right"),
    [
        ("BCA", "ACB", False),
        (r"\text{BCA}", "$ACB$", False),
        ("BCA", r"so \boxed{\text{ACB}}", False),
        (r"\mathrm{ACB}", r"\boxed{ACB}", True),
        ("on", "No", False),
        ("Yes.", "yes", True),
        ("**New York**", r"\text{new york}", True),
        ("ba", "ab", False),
        (r"b \cdot a", "ab", True),
        ("a", "ab", False),
        (r"\pi", r"\pi", True),
        ("infinity", r"\infty", True),
        ("mc 5", "5 cm", False),
        ("5", r"5\text{ cm}", True),
    ],
)
@pytest.mark.parametrize("reason", ["eos", "length"])
def test_letters_are_compared_as_text(stated, gold, right, reason):
    """Not as a product of symbols, which their order does not change; anything else is math-verify's matter."""
    assert is_correct(f"So \\boxed{{{stated}}}", Problem("?", gold, {}), finish_reason=reason) == right


def test_no_answer_to_compare_with():
    with pytest.raises(ValueError, match="needs a problem with an answer to compare with, got Problem"):
        is_correct("1", Problem("?", None, {}))


@pytest.mark.parametrize("metadata", [None, "AIME", ["source_dataset"], {}, {"source_dataset": None}, {"level": 5}])
def test_metadata_of_other_kinds(metadata):
    assert is_correct(r"\boxed{0.5}", Problem("?", "1/2", {"metadata": metadata}))


def test_the_last_number_of_a_cut_off_text():
    """math-verify takes it, with good reason only of a text that came to its end."""
    problem = Problem("?", "204", {})
    assert is_correct("we have 204", problem)
    assert not is_correct("we have 204", problem, finish_reason="length")
    assert is_correct("**The answer is $204$**\nas we have 3", problem, finish_reason="length")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1" * 20000 + "}", "1"),
        ("<answer>1" * 20000 + "</answer>", "1"),
        ("answer is x" + " " * 100000 + "y.", "x" + " " * 100000 + "y"),
        ("\\boxed{" + "1" * 100000 + "}", "1" * 100000),
    ],
    ids=["boxes", "tags", "spaces", "digits"],
)
def test_a_text_that_repeats_itself_takes_no_time(text, answer):
    """As students write: the square of its length took minutes."""
    start = time.process_time()
    assert stated_answer(text) == answer
    assert not is_correct(text, Problem("?", "2", {}), finish_reason="length")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("prime_factorization", "7x"),
        ("boxnet", "5"),
        ("countdown", "9**9**9"),
        ("countdown", "__import__('os').system('false')"),
    ],
)
def test_what_a_verifier_cannot_take_is_wrong(task, answer, monkeypatch):
    """Some evaluate what they are given."""
    monkeypatch.setattr("motab.grading._SECONDS", 1)
    ran = []
    monkeypatch.setattr("os.system", ran.append)
    (problem,) = load_problems(f"reasoning-gym:{task}?size=1&seed=1")
    assert not is_correct(f"\\boxed{{{answer}}}", problem)
    assert not ran


def test_what_a_verifier_is_given(monkeypatch):
    """No answer beyond a thousand characters; in a thread, where it can have no time limit, one as elsewhere."""
    monkeypatch.setattr("reasoning_gym.get_score_answer_fn", lambda task: lambda answer, record: 1.0)
    problem = Problem("?", "1", {"metadata": {"source_dataset": "chain_sum"}})
    assert is_correct("\\boxed{" + "1" * 1000 + "}", problem)
    assert not is_correct("\\boxed{" + "1" * 1001 + "}", problem)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(is_correct, r"\boxed{1}", problem).result()


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
    assert f"got trajectory 0 of {path} without a grade; run its motab synthesize again" in capsys.readouterr().err
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"teacher_rank":[', b'"teacher_rank":[\0', 1)  # is written again
    path.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match="the first is line 2"):
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
    left_out = f"{20 - sum(right)} of 20 trajectories have a wrong answer"
    with pytest.warns(UserWarning, match=left_out):
        assert main(train) == 0
    with pytest.warns(UserWarning, match=left_out):
        assert main(["export", *out, "--output_file", str(tmp_path / "t.jsonl"), "--only_correct"]) == 0
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == sum(right)


def test_only_correct_ones():
    marked = [trajectory(i, t.prompt_ids, t.token_ids, t.author) for i, t in enumerate([*TRAJECTORIES, *TRAJECTORIES])]
    for t, correct in zip(marked, [True, False, True, True], strict=True):
        t.correct = correct
    message = "1 of 4 trajectories have more than max_length 6 tokens and 1 of 4 trajectories have a wrong answer"
    with pytest.warns(UserWarning, match=message):
        kept = TrajectoryDataset([marked[0], marked[1], marked[3], marked[3]], max_length=6, only_correct=True)
    assert list(kept) == [TrajectoryDataset(marked)[3]] * 2
    assert len(TrajectoryDataset(marked)) == 4
    with pytest.raises(
        ValueError, match="2 of 2 trajectories have a wrong answer: none is left; leave only_correct out"
    ):
        TrajectoryDataset([marked[1]] * 2, only_correct=True)
    marked[3].correct = None
    with pytest.raises(ValueError, match="got trajectory 3 without a grade"):
        TrajectoryDataset(marked, only_correct=True)
    assert figures(marked)["correct"] == pytest.approx(2 / 3)


def test_the_trainer_takes_only_correct_ones(tmp_path, student):
    for t, correct in zip(TRAJECTORIES, [True, False], strict=True):
        t.correct = correct
    try:
        with pytest.warns(UserWarning, match="1 of 2 trajectories have a wrong answer"):
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
        return np.float32(place % 3 == 0)  # which is not JSON

    rollouts = motab.Rollouts(prompts, POLICIES["on-policy"], grade=is_right, **SETTINGS)
    settings = {"num_train_epochs": 1, "logging_steps": 1, "per_device_train_batch_size": 3, "save_rollouts": True}
    args = config(tmp_path, loss_type="reverse_kl", **settings)
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

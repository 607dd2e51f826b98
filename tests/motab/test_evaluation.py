"""Verification of answers, and the figures made of it."""

import json
import math
import re
from types import SimpleNamespace

import pytest

import motab
from motab import evaluation
from motab.data import Problem, load_problems
from motab.evaluation import evaluate, is_correct, stated_answer
from motab.prompts import PromptFormat


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


def test_figures_and_answers(monkeypatch, tmp_path, student, tokenizer):
    """Four problems, two samples each, with known outcomes."""
    answers = ["1", "1", "1", "0", "0", "0", "1", "1"]

    def fake(model, teacher, tokenizer, prompts, **settings):
        for index, answer in enumerate(answers):
            reason = "length" if index == 4 else "eos"
            text = f"\\boxed{{{answer}}} é\u2028"
            ids = [1] * index
            yield motab.Trajectory(index, [], ids, ["student"] * index, text, [], None, None, reason)

    monkeypatch.setattr("motab.synthesis.synthesize", fake)
    path = tmp_path / "answers" / "a.jsonl"
    settings = {"samples": 2, "temperature": 1.0, "answers_file": path}
    result = evaluate(student, tokenizer, [Problem("a", "1", {})] * 4, **settings)
    assert result.correct == (1.0, 0.5, 0.0, 1.0)
    assert result.accuracy == 0.625
    deviations = [0.375, 0.125, 0.625, 0.375]
    assert result.standard_error == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 3 / 4))
    assert result.overlong == 1 / 8
    assert str(result) == "0.625 ± 0.239"
    assert result.pass_at_k == 0.75
    lines = path.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [
        {
            "index": index // 2,
            "sample": index % 2,
            "text": f"\\boxed{{{answer}}} é\u2028",
            "correct": answer == "1",
            "finish_reason": "length" if index == 4 else "eos",
            "tokens": index,
        }
        for index, answer in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("prompt", "reason", "accuracy"),
    [("?<think>\n", "eos", 0.0), ("?", "eos", 1.0), ("?", "length", 0.0), ("<think>?", "eos", 1.0)],
)
def test_what_the_grading_is_told(monkeypatch, student, prompt, reason, accuracy):
    """How the text ended, and whether the prompt's template has opened the thinking."""
    written = SimpleNamespace(
        index=0, prompt_ids=list(prompt.encode()), token_ids=[], text="it is 1", finish_reason=reason
    )
    bytes_tokenizer = SimpleNamespace(chat_template=None, decode=lambda ids: bytes(ids).decode())
    monkeypatch.setattr(evaluation, "synthesize", lambda *_, **__: [written])
    assert evaluate(student, bytes_tokenizer, [Problem("?", "1", {})]).accuracy == accuracy


def test_problems_are_put_as_asked(student, tokenizer, monkeypatch):
    asked = []
    write = evaluation.synthesize

    def spy(model, teacher, tokenizer, prompts, **settings):
        asked.append((prompts, settings["temperature"]))
        return write(model, teacher, tokenizer, prompts, **settings)

    monkeypatch.setattr(evaluation, "synthesize", spy)
    evaluate(student, tokenizer, [Problem("a", "1", {})], max_new_tokens=1, prompt_format=PromptFormat(suffix="b"))
    assert asked == [(["ab"], 0.6)]


def test_an_evaluation_that_is_interrupted_goes_on(tmp_path, student, tokenizer):
    problems = [Problem(text, "1", {}) for text in ("ab.", "c,a", "b", "a")]
    settings = {"samples": 2, "max_new_tokens": 9, "batch_size": 2}
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = evaluate(student, tokenizer, problems, answers_file=whole, **settings)

    def stop(trajectories, total):
        assert total == 8
        for count, trajectory in enumerate(trajectories, 1):
            yield trajectory
            if count == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(student, tokenizer, problems, answers_file=cut, watch=stop, **settings)
    assert not cut.exists()
    with pytest.raises(ValueError, match=r"cut.jsonl.unfinished was begun with other settings \(temperature"):
        evaluate(student, tokenizer, problems, answers_file=cut, temperature=0.9, **settings)
    written = []

    def noting(trajectories, total):
        for trajectory in trajectories:
            written.append((trajectory.index, total))
            yield trajectory

    assert evaluate(student, tokenizer, problems, answers_file=cut, watch=noting, **settings) == expected
    assert len(written) == 5
    assert {total for _, total in written} == {5}
    assert cut.read_bytes() == whole.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"whole.jsonl", "cut.jsonl"}


def test_a_real_model_runs_out_of_budget(student, tokenizer):
    problems = [Problem("ab.", "1", {}), Problem("c,a", "2", {})]
    result = evaluate(student, tokenizer, problems, max_new_tokens=1)
    assert (result.accuracy, result.overlong, result.problems) == (0.0, 1.0, 2)


@pytest.mark.parametrize(
    ("problems", "settings", "message"),
    [
        ([], {}, "at least one problem, got none"),
        ([Problem("a", "1", {})], {"samples": 2, "temperature": 0}, "samples must be 1 at temperature 0.* got 2 at 0"),
        (
            [Problem("a", "1", {}), Problem("b", None, {}), Problem("c", None, {})],
            {"max_new_tokens": 2},
            "answer to each problem, a text in a column answer or .*, got none in row 1 and in 2 of 3 rows in total",
        ),
    ],
)
def test_bad_input(student, tokenizer, problems, settings, message, monkeypatch):
    """Before anything is generated."""
    monkeypatch.setattr(evaluation, "synthesize", None)
    with pytest.raises(ValueError, match=re.compile(message)):
        evaluate(student, tokenizer, problems, **settings)

"""Verification of answers, and the figures made of it."""

import json
import math
import re
from types import SimpleNamespace

import pytest

import motab
from motab import evaluation
from motab.data import Problem
from motab.evaluation import evaluate
from motab.prompts import PromptFormat


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
    settings = {"num_samples": 2, "temperature": 1.0, "answers_file": path}
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
    evaluate(
        student, tokenizer, [Problem("a", "1", {})], max_new_tokens=1, prompt_format=PromptFormat(prompt_suffix="b")
    )
    assert asked == [(["ab"], 0.6)]


def test_an_evaluation_that_is_interrupted_goes_on(tmp_path, student, tokenizer):
    problems = [Problem(text, "1", {}) for text in ("ab.", "c,a", "b", "a")]
    settings = {"num_samples": 2, "max_new_tokens": 9, "batch_size": 2}
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
    assert (result.accuracy, result.overlong, result.num_problems) == (0.0, 1.0, 2)


@pytest.mark.parametrize(
    ("problems", "settings", "message"),
    [
        ([], {}, "at least one problem, got none"),
        (
            [Problem("a", "1", {})],
            {"num_samples": 2, "temperature": 0},
            "num_samples must be 1 at temperature 0.* got 2 at 0",
        ),
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

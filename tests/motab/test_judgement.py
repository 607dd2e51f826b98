"""How trajectories of every policy are checked: what the value of a step is depends on the policy."""

import dataclasses
import math

import pytest
import torch
from test_policies import POLICIES, run

import motab
import motab_kernels as mk
from motab.cli import main
from motab.judgement import SCORES, agrees
from motab_kernels import boundary_state

ALL = {**POLICIES, "on policy": motab.OnPolicy(), "teacher only": motab.TeacherOnly()}
UNBOUND = ("on policy", "truncated", "relay opd", "relay opd, tokens")


@pytest.fixture(scope="module")
def written(student, teacher, tokenizer, prompts):
    return {name: run(student, teacher, tokenizer, prompts, policy, temperature=1.0) for name, policy in ALL.items()}


@pytest.fixture
def command(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    tokenizer.save_pretrained(tmp_path)

    def command(name, trajectories, *flags, status=0):
        lines = "".join(t.to_json() + "\n" for t in trajectories)
        (tmp_path / "trajectories.jsonl").write_text(lines)
        assert main([name, "--output_dir", str(tmp_path), *flags]) == status
        return "".join(capsys.readouterr())

    return command


@pytest.mark.parametrize("score", boundary_state.SCORES)
def test_scores_are_safe_where_the_kernels_say(score):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 60, 20, generator=generator).mul(0.7)
    tokens = torch.randint(0, 20, (60,), generator=generator)
    scores = mk.fused_kl_boundary(student, teacher, tokens, boundary=mk.FixedBoundary(0.0, score=score)).score
    middle = float(scores.median())  # itself one of the scores
    out = mk.fused_kl_boundary(student, teacher, tokens, boundary=mk.FixedBoundary(middle, score=score))
    assert 0 < out.stray.sum() < 60
    for value, threshold, stray in zip(out.score.tolist(), out.threshold.tolist(), out.stray.tolist(), strict=True):
        assert agrees(score, value, threshold, not stray)
        assert value == threshold or not agrees(score, value, threshold, stray)
    assert not agrees(score, math.nan, middle, True)
    assert agrees(score, math.nan, middle, False)


def test_a_value_at_its_boundary():
    """Only a rank, which is a count, is beyond it there; of the others it may have been rounded."""
    assert [score for score in SCORES if not agrees(score, 2.0, 2.0, True)] == ["teacher_rank"]
    assert all(agrees(score, 2.0, 2.0, False) for score in SCORES)


def test_there_are_no_other_scores():
    assert tuple(SCORES) == boundary_state.SCORES


@pytest.mark.parametrize("name", ALL)
def test_what_was_written_is_consistent(written, command, name):
    trajectories = written[name]
    assert f"{len(trajectories)} trajectories, whole and consistent" in command("verify", trajectories)
    place = next((at for at, t in enumerate(trajectories) if t.steps), None)
    if place is None:
        assert name == "teacher only"
        assert {t.score for t in trajectories} == {None}
    else:
        # A value on the other side of its boundary, of a step that was accepted and of one that was not.
        strayed = [(at, t, s) for at, t in enumerate(trajectories) for s in t.steps if not s.accepted]
        accepted = [(at, t, s) for at, t in enumerate(trajectories) for s in t.steps if s.accepted]
        assert bool(strayed) == (name not in UNBOUND)
        assert bool(accepted) == (ALL[name].rules.delimiter is not None)
        for at, t, step in [*strayed[:1], *accepted[:1]]:
            is_low = t.score in ("forward_kl", "teacher_rank")
            value = step.threshold + (1 if is_low == step.accepted else -1)
            steps = [dataclasses.replace(s, value=value) if s is step else s for s in t.steps]
            other = [*trajectories[:at], dataclasses.replace(t, steps=steps), *trajectories[at + 1 :]]
            told = command("verify", other, status=2)
            assert f"trajectory {at} judges step {t.steps.index(step)} against its value and boundary" in told
    other = [dataclasses.replace(trajectories[0], breach_step=77), *trajectories[1:]]
    assert "trajectory 0 has breach_step 77 where step" in command("verify", other, status=2)


def test_a_file_that_does_not_tell_the_score(written, command):
    trajectories = [dataclasses.replace(t, score=None) for t in written["adaswitch"]]
    assert "whole and consistent" in command("verify", trajectories)
    wrong = [dataclasses.replace(trajectories[0], score="luck")]
    assert "must hold one whole trajectory, got score 'luck'" in command("verify", wrong, status=2)

"""How trajectories of every policy are checked, shown and drawn: what the value of a step is depends on the policy."""

import dataclasses
import math
import re

import pytest
import torch
from test_policies import POLICIES, run

import motab
import motab_kernels as mk
from motab import judgement
from motab.cli import main
from motab.judgement import agrees, is_unbounded
from motab.pictures import Strays, draw_steps, takeovers
from motab_kernels import boundaries

ALL = {**POLICIES, "on policy": motab.OnPolicy(), "teacher only": motab.TeacherOnly()}
VALUE, RANK, KL = "value", "teacher rank (0: likeliest)", "KL(teacher || student)"
LABELS = {"step skd": "value ratio (teacher : student)", "token skd": RANK, "adaswitch": KL}
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


@pytest.mark.parametrize("score", boundaries.SCORES)
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
    assert [score for score in boundaries.SCORES if not agrees(score, 2.0, 2.0, True)] == ["teacher_rank"]
    assert all(agrees(score, 2.0, 2.0, False) for score in boundaries.SCORES)


def test_a_threshold_of_zero_is_none_where_high_is_safe():
    assert [score for score in (None, *boundaries.SCORES) if is_unbounded(score, 0.0)] == [
        None,
        "teacher_value",
        "value_ratio",
    ]
    assert not is_unbounded(None, 0.1)


def test_there_are_no_other_scores():
    assert tuple(judgement.LABELS) == boundaries.SCORES


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


@pytest.mark.parametrize("name", ALL)
def test_show_calls_things_by_their_names(written, command, tokenizer, name):
    place = max(range(len(written[name])), key=lambda at: len(written[name][at].steps))
    trajectory = written[name][place]
    lines = re.findall(r"^(?:step|token) \d+: .*$", command("show", written[name], "--index", str(place)), re.M)
    assert len(lines) == len(trajectory.steps)
    for at, (line, step) in enumerate(zip(lines, trajectory.steps, strict=True)):
        where = f"token {step.start}" if trajectory.by_token else f"step {at}"
        assert line.startswith(f"{where}: {LABELS.get(name, VALUE)} ")
        assert (", boundary " in line) == (name not in UNBOUND)
        assert ("breach" in line) == (not step.accepted)
        assert ("rolled back to" in line) == (at == trajectory.breach_step and not trajectory.by_token)
        assert (f"left out {tokenizer.decode(step.discarded_ids or [])!r}" in line) == (step.discarded_ids is not None)
        if name == "token skd":
            assert re.search(rf"\) {step.value:.0f}, boundary 2, ", line)


@pytest.mark.parametrize("name", ALL)
def test_the_report_draws_what_there_is(written, command, tmp_path, name):
    command("report", written[name])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == {"teacher only": 0, "on policy": 1, "truncated": 1}.get(name, 2)
    unit = "tokens" if name in ("token skd", "adaswitch") else "steps"
    title = f"<h2>How the {unit} were judged: {LABELS.get(name, VALUE)}</h2>"
    assert (title in page) == (name != "teacher only")
    if name not in UNBOUND and name != "teacher only":
        assert re.search(rf"mean rollback\s+\d+\.\d\d {unit}", page)


def test_breaches_are_counted_each(written):
    trajectories = written["step skd"]
    (axis,) = Strays(trajectories).draw().axes
    heights = [bar.get_height() for bar in axis.patches]
    for place, height in enumerate(heights):
        steps = [t.steps[place] for t in trajectories if len(t.steps) > place]
        assert height == pytest.approx(sum(not s.accepted for s in steps) / len(steps))
    assert sum(not s.accepted for t in trajectories for s in t.steps) > sum(
        t.breach_step is not None for t in trajectories
    )


@pytest.mark.parametrize("name", ["token skd", "adaswitch", "relay opd"])
def test_takeovers_are_drawn_where_they_are(written, name):
    trajectories = written[name]
    assert max(len(t.author) for t in trajectories) <= 60  # so that a bar is a token
    taken = [start for t in trajectories for start in takeovers(t)]
    for t in trajectories:
        assert all(t.author[start] == "teacher" for start in takeovers(t))
    (axis,) = Strays(trajectories).draw().axes
    assert axis.get_title() == "Where the teacher takes over"
    for place, bar in enumerate(axis.patches):
        kept = sum(t.author[place : place + 1] == ["student"] for t in trajectories)
        assert bar.get_height() == pytest.approx(taken.count(place) / max(taken.count(place) + kept, 1))
    assert len(taken) == sum(len(t.steps) for t in trajectories) or name == "relay opd"
    assert taken


def test_tokens_are_drawn_beside_what_was_left_out(written):
    trajectory = next(t for t in written["token skd"] if t.steps)
    (axis,) = draw_steps([trajectory]).axes
    lines = {line.get_label(): line for line in axis.lines}
    kept = [math.nan if rank is None else rank for rank in trajectory.statistics["teacher_rank"]]
    assert lines[RANK].get_ydata() == pytest.approx(kept, nan_ok=True)
    assert list(lines["breach, left out"].get_ydata()) == [s.value for s in trajectory.steps]
    assert list(lines["breach, left out"].get_xdata()) == [s.start for s in trajectory.steps]

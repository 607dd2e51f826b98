"""Scores, thresholds, breaches and rollbacks of `fused_kl_boundary` by definition, and the rows' state."""

import math

import boundary_cases
import numpy as np
import pytest
import torch
from boundary_cases import (
    BOUNDARIES,
    INF,
    NAN,
    assert_equal,
    decide,
    definition,
    random_inputs,
    stepwise,
    with_values,
)

import motab_kernels as mk

backend = boundary_cases.backend


def score_of(tokens, name):
    """Score of a step from the statistics of its tokens, by the table in `FixedBoundary`."""

    def mean(key):
        return sum(token[key] for token in tokens) / len(tokens)

    if name == "value_ratio":
        return math.exp(mean("teacher_logprob") - mean("student_logprob"))
    if name in ("forward_kl", "reverse_kl"):
        return mean(name)
    if name == "teacher_rank":
        return max(token["teacher_rank"] for token in tokens)
    return math.exp(mean("teacher_logprob"))


def threshold_of(boundary, b, logits, first, accepted):
    if isinstance(boundary, mk.MovingAverageBoundary):
        last = accepted[-boundary.window :]
        return boundary.factor * sum(last) / boundary.window if len(last) == boundary.window else INF
    if isinstance(boundary, mk.FixedBoundary):
        return boundary.threshold
    entropy = first["teacher_entropy"]
    if boundary.entropy_top_k:
        p = logits.double().softmax(-1).sort(descending=True).values[: boundary.entropy_top_k]
        p = p / p.sum()
        entropy = -(p * p.log()).sum().item()
    epsilon0, theta = (torch.as_tensor(x).expand(4)[b].item() for x in (boundary.epsilon0, boundary.theta))
    return epsilon0 * math.exp(-theta * entropy)


@pytest.mark.parametrize("name", BOUNDARIES)
def test_decisions_by_definition(name):
    boundary = BOUNDARIES[name]
    score = getattr(boundary, "score", "forward_kl" if name == "moving average" else "teacher_value")
    high_is_safe = score in ("teacher_value", "value_ratio")
    B, T = 4, 40
    breaches = []

    def found_in(scores, thresholds):  # a rank is safe below its threshold: at half a rank less, or under
        return decide(scores, [x - 0.5 * (score == "teacher_rank") for x in thresholds], high_is_safe)

    for seed in range(8):
        student, teacher, tokens, step_ends = stepwise(B, T, seed)
        state = boundary.new_state(B)
        inputs = (student, teacher, tokens)
        out = mk.fused_kl_boundary(*inputs, boundary=boundary, state=state, step_ends=step_ends)
        for b in range(B):
            starts, ends, scores, thresholds, step = [], [], [], [], []
            for i in range(T):
                if not step:
                    starts.append(i)
                    first = definition(student[b, i], teacher[b, i], tokens[b, i])
                    threshold = threshold_of(boundary, b, teacher[b, i], first, scores)
                step.append(definition(student[b, i], teacher[b, i], tokens[b, i]))
                assert out.score[b, i].item() == pytest.approx(score_of(step, score), rel=1e-4, abs=1e-6)
                assert out.threshold[b, i].item() == pytest.approx(threshold, rel=1e-4, abs=1e-6)
                if step_ends[b, i]:
                    ends.append(i + 1)
                    scores.append(score_of(step, score))
                    thresholds.append(threshold)
                    step = []
                    if found_in(scores, thresholds):
                        break
            found = found_in(scores, thresholds)
            positions = (ends[found[0]], starts[found[1]]) if found else (-1, -1)
            assert (state.breach_position[b].item(), state.rollback_position[b].item()) == positions
            assert out.stray[b].nonzero().flatten().tolist() == ([positions[0] - 1] if found else [])
            breaches.append(found)
    # The inputs must reach every case: breach in the first step, at t* < t, at t* = t, and none.
    steps = [found for found in breaches if found]
    assert any(t > t_star for t, t_star in steps)
    assert any(t == t_star > 0 for t, t_star in steps)


@pytest.mark.parametrize("name", BOUNDARIES)
def test_blocks_decide_as_the_whole(name):
    boundary = BOUNDARIES[name]
    B, T = 4, 32
    for seed in range(4):
        student, teacher, tokens, step_ends = stepwise(B, T, seed + 100)
        tokens = tokens.masked_fill(torch.rand(B, T) < 0.1, -1)
        expected_state = boundary.new_state(B)
        inputs = (student, teacher, tokens)
        expected = mk.fused_kl_boundary(*inputs, boundary=boundary, state=expected_state, step_ends=step_ends)
        for size in (1, 3, 16):
            state = boundary.new_state(B)
            blocks = [
                mk.fused_kl_boundary(
                    *(x[:, i : i + size] for x in inputs),
                    boundary=boundary,
                    state=state,
                    step_ends=step_ends[:, i : i + size],
                )
                for i in range(0, T, size)
            ]
            assert_equal(mk.BoundaryOutput(*(torch.cat(x, 1) for x in zip(*blocks, strict=True))), expected)
            for part in ("counters", "scores", "history"):
                assert torch.equal(getattr(state, part), getattr(expected_state, part)), part


@pytest.mark.parametrize("name", BOUNDARIES)
@pytest.mark.parametrize("T", [0, 24])
def test_no_state_decides_as_a_fresh_one(name, T):
    boundary = BOUNDARIES[name]
    *inputs, step_ends = stepwise(4, max(T, 1), seed=7)
    if T == 0:  # (B, V)
        *inputs, step_ends = (x[:, 0] for x in (*inputs, step_ends))
    expected = mk.fused_kl_boundary(*inputs, boundary=boundary, state=boundary.new_state(4), step_ends=step_ends)
    for _ in range(2):  # nothing is left over from call to call
        assert_equal(mk.fused_kl_boundary(*inputs, boundary=boundary, step_ends=step_ends), expected)


@pytest.mark.parametrize(
    ("values", "breach", "rollback"),
    [
        ([0.1], 1, 0),  # t = 0
        ([0.9, 0.1], 2, 1),
        ([0.9, 0.8, 0.35, 0.32, 0.1], 5, 2),  # the deepest fall came before the breach
        ([0.5, 0.6, 0.7], -1, -1),
        ([0.9, 0.3, 0.9, NAN], 4, 3),  # NaN falls deepest
    ],
)
def test_rollback(values, breach, rollback):
    inputs = with_values(values)
    state = mk.BoundaryState(1)
    mk.fused_kl_boundary(*inputs, boundary=mk.FixedBoundary(0.3 - 1e-9), state=state)
    assert state.breach_position.tolist() == [breach]
    assert state.rollback_position.tolist() == [rollback]
    assert state.breached.tolist() == [breach >= 0]


def test_first_of_equal_falls():
    """Ranks are whole, so that falls are equal to the bit: 0 to 3 twice, 1 to 4, then 4 to 7, a breach."""
    teacher = -torch.arange(8.0).expand(1, 7, 8)
    tokens = torch.tensor([[0, 3, 0, 3, 1, 4, 7]])
    state = mk.BoundaryState(1)
    boundary = mk.FixedBoundary(5, score="teacher_rank")
    out = mk.fused_kl_boundary(torch.zeros_like(teacher), teacher, tokens, boundary=boundary, state=state)
    assert torch.equal(out.teacher_rank.long(), tokens)
    assert (state.breach_position.item(), state.rollback_position.item()) == (7, 1)


def test_a_rise_may_be_the_smallest_fall():
    """V rises from 0.2 to 0.5 while the threshold rises past it: with a single fall, t* is 1."""
    threshold = torch.tensor(0.1)
    boundary = mk.FixedBoundary(threshold)
    state = mk.BoundaryState(1)
    inputs = with_values([0.2, 0.5])
    for i, limit in ((0, 0.1), (1, 0.9)):
        threshold.fill_(limit)
        mk.fused_kl_boundary(*(x[:, i : i + 1] for x in inputs), boundary=boundary, state=state)
    assert (state.breach_position.item(), state.rollback_position.item()) == (2, 1)


def test_equal_infinities_do_not_fall():
    """The student excludes two tokens that it wrote: the ratio is infinite twice, then it falls."""
    student, teacher, tokens = torch.zeros(1, 3, 8), torch.zeros(1, 3, 8), torch.zeros(1, 3, dtype=torch.int64)
    student[0, :2, 0], teacher[0, 2, 0] = -INF, -9.0
    state = mk.BoundaryState(1)
    mk.fused_kl_boundary(student, teacher, tokens, boundary=mk.FixedBoundary(0.5, score="value_ratio"), state=state)
    assert (state.breach_position.item(), state.rollback_position.item()) == (3, 2)


def test_a_breached_row_is_frozen_until_it_is_reset():
    boundary = mk.FixedBoundary(0.3)
    state = boundary.new_state(1)
    out = mk.fused_kl_boundary(*with_values([0.9, 0.1, 0.8, 0.05]), boundary=boundary, state=state)
    assert out.stray.tolist() == [[False, True, False, False]]
    assert out.score[0].tolist() == pytest.approx([0.9, 0.1, 0.1, 0.1])
    assert out.teacher_logprob.exp()[0].tolist() == pytest.approx([0.9, 0.1, 0.8, 0.05])
    assert state.tokens.tolist() == [2]
    assert state.steps.tolist() == [1]
    state.reset_(torch.tensor(-1))
    out = mk.fused_kl_boundary(*with_values([0.05]), boundary=boundary, state=state)
    assert out.stray.tolist() == [[True]]
    assert (state.breach_position.item(), state.rollback_position.item()) == (1, 0)


@pytest.mark.parametrize(
    "rows",
    [
        [1, 3],
        (np.int64(1), 3),
        [-1, -3],
        torch.tensor([1, -1]),
        torch.tensor([1, 3], dtype=torch.int32),
        torch.tensor([False, True, False, True]),
    ],
)
def test_reset_of_some_rows(rows):
    boundary = mk.MovingAverageBoundary(0.5, 2)
    inputs = random_inputs(4, 6, 20)
    state, fresh = boundary.new_state(4), boundary.new_state(4)
    mk.fused_kl_boundary(*inputs, boundary=boundary, state=state)
    before = [x.clone() for x in (state.counters, state.scores, state.history)]
    assert state.reset_(rows) is state
    for now, old, new in zip(
        (state.counters, state.scores, state.history),
        before,
        (fresh.counters, fresh.scores, fresh.history),
        strict=True,
    ):
        assert torch.equal(now[1::2], new[1::2])
        assert torch.equal(now[0::2], old[0::2])
        assert not torch.equal(old[1::2], new[1::2])


def test_a_parameter_tensor_is_read_at_every_call():
    threshold = torch.tensor(0.0)
    boundary = mk.FixedBoundary(threshold)
    inputs = with_values([0.5])
    assert not mk.fused_kl_boundary(*inputs, boundary=boundary).stray.item()
    threshold.fill_(0.9)
    assert mk.fused_kl_boundary(*inputs, boundary=boundary).stray.item()

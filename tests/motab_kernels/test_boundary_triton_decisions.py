"""Decisions and rollbacks of the Triton kernels of `fused_kl_boundary`: on a GPU, else in Triton's interpreter."""

import pytest
import torch
from boundary_cases import BOUNDARIES, INF, stepwise, with_values
from boundary_triton_cases import DEVICE, triton

import motab_kernels as mk

pytest.importorskip("triton")

from motab_kernels.gpu import boundary as gpu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.mark.parametrize("name", BOUNDARIES)
def test_decisions_are_the_reference_s_in_blocks(name, monkeypatch):
    """Blocks of 6, 1 and 2 tokens, of which 2 are combined at a time and 4 of the combined are read at a time."""
    monkeypatch.setattr(gpu, "settings_for", lambda device: gpu.Settings(sums=2))
    monkeypatch.setattr(gpu, "WALKED", 4)
    boundary, B, T = BOUNDARIES[name], 4, 9
    student, teacher, tokens, step_ends = stepwise(B, T, seed=3)
    tokens[torch.arange(T).expand(B, T) % 7 == 5] = -1
    state, expected_state = boundary.new_state(B, DEVICE), boundary.new_state(B)
    inputs = (student, teacher, tokens)
    expected = mk.fused_kl_boundary(
        *inputs, boundary=boundary, state=expected_state, step_ends=step_ends, backend="torch"
    )
    blocks = [
        triton(
            *(x[:, start:stop] for x in inputs),
            boundary=boundary,
            state=state,
            step_ends=step_ends[:, start:stop],
        )
        for start, stop in ((0, 6), (6, 7), (7, 9))
    ]
    out = mk.BoundaryOutput(*(torch.cat(x, 1) for x in zip(*blocks, strict=True)))
    assert (expected_state.rollback_position > 0).any()  # or this would test little
    assert torch.equal(out.stray, expected.stray)
    assert torch.equal(state.counters.cpu(), expected_state.counters)
    torch.testing.assert_close(out.score, expected.score, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.threshold, expected.threshold, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.scores.cpu(), expected_state.scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.history.cpu(), expected_state.history, rtol=1e-5, atol=1e-5)


def test_rollback_and_frozen_rows():
    boundary = mk.FixedBoundary(0.3)
    inputs = [x.float() if x.is_floating_point() else x for x in with_values([0.9, 0.4, 0.8, 0.1, 0.9])]
    state = mk.BoundaryState(1, DEVICE)
    out = triton(*inputs, boundary=boundary, state=state)
    assert out.stray.tolist() == [[False, False, False, True, False]]
    assert (state.breach_position.item(), state.rollback_position.item()) == (4, 3)
    assert out.score[0, 4].item() == pytest.approx(0.1, rel=1e-5)
    assert state.tokens.item() == 4


def test_first_of_equal_falls():
    teacher = -torch.arange(8.0).expand(1, 7, 8)
    tokens = torch.tensor([[0, 3, 0, 3, 1, 4, 7]])
    state = mk.BoundaryState(1, DEVICE)
    boundary = mk.FixedBoundary(5, score="teacher_rank")
    triton(torch.zeros_like(teacher), teacher, tokens, boundary=boundary, state=state)
    assert (state.breach_position.item(), state.rollback_position.item()) == (7, 1)


def test_a_rise_may_be_the_smallest_fall():
    """V rises from 0.2 to 0.5 while the threshold rises past it: with a single fall, t* is 1."""
    threshold = torch.tensor(0.1, device=DEVICE)
    boundary = mk.FixedBoundary(threshold)
    state = mk.BoundaryState(1, DEVICE)
    student, teacher, tokens = with_values([0.2, 0.5])
    for i, limit in ((0, 0.1), (1, 0.9)):
        threshold.fill_(limit)
        triton(
            *(x[:, i : i + 1] for x in (student.float(), teacher.float(), tokens)),
            boundary=boundary,
            state=state,
        )
    assert (state.breach_position.item(), state.rollback_position.item()) == (2, 1)


def test_equal_infinities_do_not_fall():
    """The student excludes two tokens that it wrote: the ratio is infinite twice, then it falls."""
    student, teacher, tokens = torch.zeros(1, 3, 8), torch.zeros(1, 3, 8), torch.zeros(1, 3, dtype=torch.int64)
    student[0, :2, 0], teacher[0, 2, 0] = -INF, -9.0
    state = mk.BoundaryState(1, DEVICE)
    triton(student, teacher, tokens, boundary=mk.FixedBoundary(0.5, score="value_ratio"), state=state)
    assert (state.breach_position.item(), state.rollback_position.item()) == (3, 2)

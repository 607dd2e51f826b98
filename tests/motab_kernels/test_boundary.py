"""`fused_kl_boundary` against float64 written from the definition, position by position and step by step."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from boundary_cases import (
    BOUNDARIES,
    INF,
    NAN,
    STATISTICS,
    assert_equal,
    assert_matches_definition,
    decide,
    definition,
    eager,
    poisoned_output,
    random_inputs,
    stepwise,
    with_values,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import motab_kernels as mk
from motab_kernels import boundary as boundary_module
from motab_kernels.backend import HAS_LIBRARY
from motab_kernels.boundary import fused_kl_boundary_op
from motab_kernels.reference import boundary as reference
from motab_kernels.tensors import KERNEL_DTYPES

needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="needs the C++ kernels")


@pytest.fixture(autouse=True, params=["torch", pytest.param("cpu", marks=needs_library)])
def backend(request, monkeypatch):
    """What a call runs on that asks for no backend; float64 is for "torch" alone."""
    op = mk.fused_kl_boundary

    def on_backend(*arguments, **options):
        if all(getattr(x, "dtype", None) in KERNEL_DTYPES for x in arguments[:2]) and arguments:
            options.setdefault("backend", request.param)
        return op(*arguments, **options)

    monkeypatch.setattr(mk, "fused_kl_boundary", on_backend)
    return request.param


# Odd, small, a power of two's neighbour, and two real vocabularies; the last is the largest of the field.
@pytest.mark.parametrize("V", [1, 7, 1000, 32000, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "T"), [(3, 1), (1, 5)])
def test_statistics(B, T, V, dtype):
    student, teacher, tokens = random_inputs(B, T, V, dtype, seed=V)
    out = mk.fused_kl_boundary(student, teacher, tokens, out=poisoned_output((B, T)))
    assert_matches_definition(out, student, teacher, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_not_above_that_of_eager_low_precision(dtype):
    student, teacher, tokens = random_inputs(3, 5, 32000, dtype, noise=0.1)
    out = mk.fused_kl_boundary(student, teacher, tokens)
    for name, low in eager(student, teacher, dtype).items():
        exact = eager(student, teacher, torch.float64)[name]
        assert (getattr(out, name) - exact).abs().max() <= (low - exact).abs().max() + 1e-6, name


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-2])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (1e3, 0.0), (0.0, -1e3)])
def test_near_equal_logits_and_constant_shifts(noise, shift):
    student, teacher, tokens = random_inputs(2, 2, 32000, noise=noise)
    student, teacher = student + shift[0], teacher + shift[1]
    out = mk.fused_kl_boundary(student, teacher, tokens)
    assert_matches_definition(out, student, teacher, tokens)
    assert (out.forward_kl >= 0).all()
    assert (out.reverse_kl >= 0).all()


def test_float64_is_computed_in_float64():
    student, teacher, tokens = (x.double() if x.is_floating_point() else x for x in random_inputs(2, 3, 1000))
    state = mk.EntropyBoundary().new_state(2)
    mk.fused_kl_boundary(student, teacher, tokens, state=state, boundary=mk.EntropyBoundary(0.0))
    value = math.exp(definition(student[0, 2], teacher[0, 2], tokens[0, 2])["teacher_logprob"])
    _, score, *_ = state.scores[0].tolist()
    assert score == pytest.approx(value, rel=1e-12)
    mixed = student.float(), teacher, tokens  # no kernel takes them
    assert_matches_definition(mk.fused_kl_boundary(*mixed), *mixed)


@pytest.mark.parametrize("temperature", [0.6, torch.tensor(0.6), torch.tensor([0.5, 1.0, 2.0]), 1e-30, 1e30])
def test_temperature(temperature):
    student, teacher, tokens = random_inputs(3, 2, 1000)
    out = mk.fused_kl_boundary(student, teacher, tokens, temperature=temperature)
    tau = temperature.expand(3) if isinstance(temperature, torch.Tensor) else torch.full((3,), temperature)
    assert_matches_definition(out, student, teacher, tokens, tau)


def test_fewer_logits_at_a_time_than_a_position_has(monkeypatch):
    inputs = random_inputs(2, 3, 50)
    expected = mk.fused_kl_boundary(*inputs, backend="torch")
    monkeypatch.setattr(reference, "CHUNK", 20)
    assert_equal(mk.fused_kl_boundary(*inputs, backend="torch"), expected)


def test_tokens_outside_the_vocabulary_have_no_probability():
    """As on a GPU, where the definition does not look before."""
    student, teacher, _ = random_inputs(1, 3, 50)
    found = reference.statistics(student[0], teacher[0], torch.tensor([-2, 50, 49]), None)
    for x in (found.student_logprob, found.teacher_logprob):
        assert x.isnan().tolist() == [True, True, False]
    assert found.teacher_rank[:2].tolist() == [-1, -1]


def test_no_statistic_has_the_wrong_sign_by_rounding():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 64, 4096, generator=generator)
    tokens = torch.randint(4096, (1, 64), generator=generator)
    teacher.scatter_(2, tokens[..., None], torch.linspace(25, 45, 64)[None, :, None])
    out = mk.fused_kl_boundary(teacher, teacher, tokens)
    assert min(x.min() for x in (out.student_entropy, out.teacher_entropy, out.forward_kl, out.reverse_kl)) >= 0
    assert max(out.student_logprob.max(), out.teacher_logprob.max()) <= 0


def test_a_tensor_that_is_negated_when_it_is_read():
    student, teacher, tokens = random_inputs(2, 3, 50)
    expected = mk.fused_kl_boundary(-student, -teacher, tokens)
    assert_equal(mk.fused_kl_boundary(torch._neg_view(student), torch._neg_view(teacher), tokens), expected)


def test_top_k_entropy_of_large_logits():
    """Divided by the temperature before their maximum is subtracted, they would lose three digits."""
    teacher, tau = torch.tensor([[30000.37, 30000.11, 29999.9]]), torch.tensor(0.1338)
    p = (teacher.double() / tau).softmax(-1)
    boundary = mk.EntropyBoundary(1.0, 1.0, entropy_top_k=3)
    out = mk.fused_kl_boundary(torch.zeros(1, 3), teacher, torch.tensor([0]), boundary=boundary, temperature=tau)
    assert out.threshold.item() == pytest.approx(math.exp((p * p.log()).sum().item()), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top_k_entropy_of_more_tokens_than_there_are(temperature):
    """Of logits in bfloat16, one of them without probability."""
    teacher = torch.tensor([[1.5, 0.25, -INF, 2.125]] * 2, dtype=torch.bfloat16)
    p = (teacher[0, [0, 1, 3]].double() / temperature).softmax(-1)
    out = mk.fused_kl_boundary(
        torch.zeros(2, 4),
        teacher,
        torch.tensor([0, 3]),
        boundary=mk.EntropyBoundary(1.0, 1.0, entropy_top_k=20),
        temperature=temperature,
    )
    assert out.threshold.tolist() == pytest.approx([math.exp((p * p.log()).sum().item())] * 2, rel=1e-6)


def test_a_state_outlives_inference_mode():
    student, teacher, tokens = random_inputs(2, 3, 50)
    with torch.inference_mode():
        state = mk.EntropyBoundary(0.0).new_state(2)
        mk.fused_kl_boundary(student, teacher, tokens, boundary=mk.EntropyBoundary(0.0), state=state)
    mk.fused_kl_boundary(student, teacher, tokens, boundary=mk.EntropyBoundary(0.0), state=state)
    assert state.tokens.tolist() == [6, 6]
    assert state.reset_().tokens.tolist() == [0, 0]


def test_different_vocabularies_and_vocab_size():
    student, teacher, tokens = random_inputs(2, 3, 1000)
    expected = mk.fused_kl_boundary(student, teacher, tokens)
    padded_student = torch.cat((student, torch.full((2, 3, 64), NAN)), -1)
    padded_teacher = torch.cat((teacher, torch.full((2, 3, 192), 1e30)), -1)
    assert_equal(mk.fused_kl_boundary(padded_student, teacher, tokens), expected)
    assert_equal(mk.fused_kl_boundary(student, padded_teacher, tokens), expected)
    assert_equal(mk.fused_kl_boundary(padded_student, padded_teacher, tokens, vocab_size=1000), expected)
    assert_equal(mk.fused_kl_boundary(student, padded_teacher, tokens, vocab_size=1100), expected)


def test_excluded_columns():
    student, teacher, tokens = random_inputs(1, 4, 1000)
    tokens[:] = 5
    both, student_only, teacher_only, token = range(4)
    student[0, both, 10:20] = teacher[0, both, 10:20] = -INF
    student[0, student_only, 10] = -INF
    teacher[0, teacher_only, 10] = -INF
    teacher[0, token, 5] = -INF
    boundary = mk.FixedBoundary(0.0)  # V = 0 is still at the threshold
    out = mk.fused_kl_boundary(student, teacher, tokens, boundary=boundary)
    assert_matches_definition(out, student, teacher, tokens)
    assert out.forward_kl.isinf().tolist() == [[False, True, False, False]]
    assert out.reverse_kl.isinf().tolist() == [[False, False, True, True]]
    assert out.teacher_logprob[0, token] == -INF
    assert out.score[0, token] == 0
    assert not out.stray.any()
    for i in range(4):  # where no other position excludes anything
        alone = mk.fused_kl_boundary(*(x[:, i : i + 1] for x in (student, teacher, tokens)), boundary=boundary)
        assert_equal(alone, mk.BoundaryOutput(*(x[:, i : i + 1] for x in out)))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    "boundary",
    [mk.EntropyBoundary(0.0), mk.MovingAverageBoundary(9.0, 3), mk.FixedBoundary(1000, score="teacher_rank")],
)
def test_nan_strays_at_the_end_of_its_step(side, value, boundary):
    *logits, tokens = random_inputs(3, 4, 1000)
    logits[side][1, 1, 999] = value
    if side == 1 and value == INF:
        logits[side][2, 1] = -INF  # a side without any probability
    step_ends = torch.tensor([False, False, True, True]).expand(3, 4)
    state = boundary.new_state(3)
    out = mk.fused_kl_boundary(*logits, tokens, boundary=boundary, state=state, step_ends=step_ends)
    bad = out.forward_kl.isnan()
    assert bad[1].tolist() == [False, True, False, False]
    for name in STATISTICS:
        assert torch.equal(getattr(out, name).isnan(), bad), name
    assert out.teacher_rank[1, 1] == out.teacher_argmax[1, 1] == -1
    assert out.stray.tolist() == [[False, False, b and bad[b].any().item(), False] for b in range(3)]
    assert state.breach_position.tolist() == [3 if bad[b].any() else -1 for b in range(3)]


def test_padding_counts_for_nothing():
    student, teacher, tokens = random_inputs(2, 4, 1000)
    keep = torch.tensor([True, False, True, True])
    padded = tokens.masked_fill(~keep, -1)
    student[:, 1], teacher[:, 1] = NAN, INF
    boundary = mk.MovingAverageBoundary(1e9, 2)
    state, expected_state = boundary.new_state(2), boundary.new_state(2)
    out = poisoned_output((2, 4))
    mk.fused_kl_boundary(student, teacher, padded, boundary=boundary, state=state, out=out)
    expected = mk.fused_kl_boundary(
        student[:, keep], teacher[:, keep], tokens[:, keep], boundary=boundary, state=expected_state
    )
    assert_equal(mk.BoundaryOutput(*(x[:, keep] for x in out)), expected)
    for name, x in zip(out._fields, out, strict=True):
        assert (x[:, 1] == (-1 if name in ("teacher_rank", "teacher_argmax") else 0)).all(), name
    for name in ("counters", "scores", "history"):
        assert torch.equal(getattr(state, name), getattr(expected_state, name)), name


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_batch(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        student, teacher, tokens = random_inputs(3, 2, 151936, torch.bfloat16)
        whole = mk.fused_kl_boundary(student, teacher, tokens)
        for b in range(3):
            for i in range(2):
                alone = mk.fused_kl_boundary(student[b, i, None], teacher[b, i, None], tokens[b, i, None])
                row = mk.BoundaryOutput(*(x[b, i, None] for x in whole))
                assert_equal(alone, row, mk.BoundaryOutput._fields[:8])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty(shape):
    tokens = torch.zeros(shape, dtype=torch.int64)
    state = mk.EntropyBoundary().new_state(shape[0])
    out = mk.fused_kl_boundary(torch.randn(*shape, 7), torch.randn(*shape, 7), tokens, state=state)
    assert all(x.shape == shape for x in out)
    assert state.tokens.tolist() == [0] * shape[0]


def test_two_dimensional_input_is_one_token():
    student, teacher, tokens = random_inputs(3, 1, 1000)
    out = mk.fused_kl_boundary(student[:, 0], teacher[:, 0], tokens[:, 0])
    expected = mk.fused_kl_boundary(student, teacher, tokens)
    assert_equal(out, mk.BoundaryOutput(*(x[:, 0] for x in expected)))


def test_strides():
    student, teacher, tokens = random_inputs(2, 3, 1000)
    expected = mk.fused_kl_boundary(student, teacher, tokens)
    wide = torch.full((3, 2, 1100), NAN)
    wide[..., 50:1050] = student.transpose(0, 1)
    spread = torch.stack((teacher, torch.full_like(teacher, NAN)), -1)[..., 0]
    turned = tokens.t().contiguous().t()
    assert_equal(mk.fused_kl_boundary(wide[..., 50:1050].transpose(0, 1), spread, turned), expected)
    step_ends = torch.tensor([[False, True, True], [True, False, False]])
    of_steps = mk.fused_kl_boundary(student, teacher, tokens, step_ends=step_ends)
    assert_equal(mk.fused_kl_boundary(student, teacher, turned, step_ends=step_ends.t().contiguous().t()), of_steps)
    column = torch.stack((tokens[:, 0], tokens[:, 1]), 1)[:, 0]  # (B,), apart
    one = mk.fused_kl_boundary(student[:, 0], teacher[:, 0], column, step_ends=step_ends[:, 0])
    assert_equal(one, mk.BoundaryOutput(*(x[:, 0] for x in of_steps)))


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


def test_a_fake_call_leaves_no_fake_constant():
    inputs = random_inputs(1, 1, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        mk.fused_kl_boundary(*inputs, boundary=mk.FixedBoundary(0.123456), temperature=0.654321)
    out = mk.fused_kl_boundary(*inputs, boundary=mk.FixedBoundary(0.123456), temperature=0.654321)
    assert out.threshold.item() == pytest.approx(0.123456)


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


def test_numbers_that_are_kept_on_their_device_are_few(monkeypatch):
    monkeypatch.setattr(boundary_module, "MOST_CONSTANTS", 3)
    for i in range(9):
        mk.fused_kl_boundary(*with_values([0.5]), boundary=mk.FixedBoundary(i / 10), temperature=1 + i / 10)
    assert len(boundary_module._constants) <= 3


def test_out_is_returned_and_logits_may_require_grad():
    student, teacher, tokens = random_inputs(2, 3, 50)
    out = poisoned_output((2, 3))
    assert mk.fused_kl_boundary(student.requires_grad_(), teacher, tokens, out=out) is out
    assert not any(x.requires_grad for x in out)
    assert_equal(out, mk.fused_kl_boundary(student, teacher, tokens))


GOOD = {
    "student_logits": torch.zeros(2, 3, 8),
    "teacher_logits": torch.zeros(2, 3, 8),
    "token_ids": torch.zeros(2, 3, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student_logits": torch.zeros(2, 3, 8, dtype=torch.int32)},
            "student_logits: expected float32.*int32",
        ),
        ({"student_logits": torch.zeros(1, 2, 3, 8)}, r"student_logits: expected shape .*got \(1, 2, 3, 8\)"),
        ({"student_logits": torch.zeros(8)}, r"student_logits: expected shape \(B, V\) or.*got \(8,\)"),
        (
            {"teacher_logits": torch.zeros(2, 4, 8)},
            r"teacher_logits: .*\(2, 3, 'V'\), got \(2, 4, 8\)",
        ),
        ({"teacher_logits": torch.zeros(2, 3, 0)}, "expected a shared vocabulary"),
        ({"teacher_logits": torch.zeros(2, 3, 8).to_sparse()}, "teacher_logits: expected a dense .* torch.sparse_coo"),
        ({"teacher_logits": torch.zeros(2, 3, 8, device="meta")}, "teacher_logits: .*on cpu, got .*on meta"),
        (
            {"token_ids": torch.zeros(2, 3, dtype=torch.int32)},
            "token_ids: .* torch.int64.*got torch.int32",
        ),
        ({"token_ids": torch.zeros(2, dtype=torch.int64)}, r"token_ids: expected .*\(2, 3\).*got .*\(2,\)"),
        ({"token_ids": torch.full((2, 3), 8)}, "token_ids: expected -1 or 0 to 7, got 8"),
        ({"token_ids": torch.full((2, 3), -2)}, "token_ids: expected -1 or 0 to 7, got -2"),
        ({"step_ends": torch.zeros(2, 3)}, "step_ends: expected torch.bool .*got torch.float32"),
        ({"step_ends": torch.zeros(2, 2, dtype=torch.bool)}, r"step_ends: .*\(2, 3\).*got .*\(2, 2\)"),
        ({"temperature": 0.0}, r"temperature: expected a finite number from 1e-30 to 1e\+30, got 0.0"),
        ({"temperature": NAN}, r"temperature: expected a finite number from 1e-30 to 1e\+30, got nan"),
        ({"temperature": 1e-40}, "temperature: expected .* from 1e-30 to 1e.30, got 1e-40"),
        ({"temperature": torch.tensor([1.0, 1e-40])}, "temperature: expected .* from 1e-30 to 1e.30, got"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature: expected finite values from 1e-30 to 1e\+30"),
        ({"temperature": torch.tensor([1.0, INF])}, r"temperature: expected finite values from 1e-30 to 1e\+30"),
        ({"temperature": torch.ones(3)}, r"temperature: expected a number or a tensor, 0-d or \(2,\)"),
        ({"temperature": torch.ones(2, 3)}, r"temperature: expected a floating-point tensor, 0-d or \(B,\)"),
        ({"temperature": torch.ones(2, device="meta")}, r"temperature: .* on cpu, got shape \(2,\) on meta"),
        ({"vocab_size": 0}, "vocab_size: expected an integer >= 1, got 0"),
        ({"boundary": 0.2}, "boundary: expected EntropyBoundary, .*got float"),
        ({"boundary": mk.FixedBoundary(torch.ones(3))}, r"threshold: expected .*\(2,\).*got shape \(3,\)"),
        ({"state": mk.BoundaryState(3)}, r"state: expected one for 2 rows.*batch_size=3"),
        ({"state": mk.BoundaryState(2, window=4)}, "state: expected .*window 0.*window=4"),
        ({"state": 3}, "state: expected a BoundaryState, got int"),
        ({"out": poisoned_output((2, 2))}, r"out.forward_kl: expected .*\(2, 3\).*got .*\(2, 2\)"),
        (
            {"out": poisoned_output((2, 3))._replace(score=torch.zeros(2, 3).double())},
            "out.score: expected torch.float32 .*got torch.float64",
        ),
        (
            {"out": poisoned_output((2, 3))._replace(stray=torch.zeros(3, 2, dtype=torch.bool).t())},
            r"out.stray: expected a contiguous tensor, got strides \(1, 2\)",
        ),
        ({"backend": "cuda"}, "backend: expected one of torch.* or None, got 'cuda'"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(change, message):
    arguments = {**GOOD, "state": mk.BoundaryState(2), **change}
    with pytest.raises(ValueError, match=message):
        mk.fused_kl_boundary(**arguments)
    if isinstance(arguments["state"], mk.BoundaryState):
        assert (arguments["state"].tokens == 0).all()


def test_a_state_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"state: expected .* on cpu: .*device='meta'"):
        mk.fused_kl_boundary(**GOOD, state=mk.BoundaryState(2, "meta"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mk.EntropyBoundary(-0.1, 1.0), "epsilon0: expected a finite number >= 0, got -0.1"),
        (lambda: mk.EntropyBoundary(0.2, NAN), "theta: expected a finite number >= 0, got nan"),
        (lambda: mk.EntropyBoundary(torch.tensor(-1.0)), "epsilon0: expected finite values >= 0, got -1.0"),
        (lambda: mk.FixedBoundary(-INF), "threshold: expected a finite number, got -inf"),
        (lambda: mk.FixedBoundary(torch.tensor(INF)), "threshold: expected finite values, got inf"),
        (lambda: mk.EntropyBoundary(torch.tensor(1)), "epsilon0: expected a floating-point tensor"),
        (lambda: mk.EntropyBoundary("0.2"), "epsilon0: expected a number or a tensor, got str"),
        (lambda: mk.EntropyBoundary(0.2, 1.0, 0), "entropy_top_k: expected an integer >= 1, got 0"),
        (lambda: mk.FixedBoundary(0.2, score="kl"), "score: expected one of teacher_value, .*got 'kl'"),
        (lambda: mk.MovingAverageBoundary(-0.1, 2), "factor: expected a finite number >= 0, got -0.1"),
        (lambda: mk.MovingAverageBoundary(2.0, 0), "window: expected an integer >= 1, got 0"),
        (lambda: mk.BoundaryState(-1), "batch_size: expected an integer >= 0, got -1"),
        (lambda: mk.BoundaryState(2, window=-1), "window: expected an integer >= 0, got -1"),
        (lambda: mk.BoundaryState(2).reset_([2]), r"rows: expected indices into 2 rows, .* got \[2\]"),
        (lambda: mk.BoundaryState(2).reset_([-3]), r"rows: expected indices into 2 rows, .* got \[-3\]"),
        (lambda: mk.BoundaryState(2).reset_(torch.ones(1, 1).long()), r"rows: .* got torch.int64 of shape \(1, 1\)"),
        (lambda: mk.BoundaryState(2).reset_(torch.ones(1, device="meta").long()), "rows: .* on cpu, got one on meta"),
        (
            lambda: mk.BoundaryState(2).reset_([True, False]),
            r"rows: expected indices into 2 rows, .* got \[True, False\]",
        ),
        (lambda: mk.BoundaryState(2).reset_(np.array([True, False])), r"rows: expected indices .* got array\(\[ True"),
        (lambda: mk.BoundaryState(2).reset_([0.5]), r"rows: expected indices .* got \[0.5\]"),
        (lambda: mk.BoundaryState(2).reset_(1), "rows: expected indices into 2 rows, .* got 1"),
        (lambda: mk.BoundaryState(2).reset_(torch.tensor([5])), "rows: expected indices into 2 rows, .* got .*5"),
        (lambda: mk.BoundaryState(2).reset_(torch.ones(3, dtype=torch.bool)), r"rows: .*\(2,\), got \(3,\)"),
        (
            lambda: mk.BoundaryState(2).reset_(torch.ones(2)),
            "rows: .* integer tensor, got torch.float32",
        ),
    ],
)
def test_bad_boundaries_and_rows_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("scores", torch.zeros(2, 5), r"scores: expected .*float64 of shape \(2, 5\).*got torch.float32"),
        ("scores", torch.zeros(1, 5).double(), r"scores: expected .*\(2, 5\).*got .*\(1, 5\)"),
        ("counters", torch.zeros(4, 6).int()[::2], r"counters: expected contiguous.*strides \(12, 1"),
        ("history", torch.zeros(2, 3), "history: expected .*float64 .*got torch.float32"),
        ("scores", torch.zeros(2, 5, device="meta").double(), "scores: expected .* on cpu, got .* on meta"),
    ],
)
def test_other_tensors_make_no_state(name, other, message):
    """Kernels would write beyond them."""
    tensors = {"counters": torch.zeros(2, 6).int(), "scores": torch.zeros(2, 5).double()}
    tensors |= {"history": torch.zeros(2, 3).double(), name: other}
    with pytest.raises(ValueError, match=message):
        mk.BoundaryState.of(**tensors)
    with pytest.raises(AttributeError, match=name):
        setattr(mk.BoundaryState(2), name, other)


def op_arguments():
    student, teacher, tokens = random_inputs(2, 3, 50)
    state = mk.BoundaryState(2, window=2)
    one = torch.tensor(1.0, dtype=torch.float64)
    tensors = [state.counters, state.scores, state.history]
    return (student, teacher, tokens, tokens > 25, one, one, one, tensors, list(poisoned_output((2, 3))))


def test_opcheck(backend):
    torch.library.opcheck(fused_kl_boundary_op, (*op_arguments(), None, "teacher_value", 3, 50, backend))


@pytest.mark.parametrize("boundary", [mk.EntropyBoundary(0.5, 0.01), mk.MovingAverageBoundary(1.1, 2)])
def test_compiles_whole(boundary):
    def score(student, teacher, tokens, state):
        out = mk.fused_kl_boundary(student * 2, teacher, tokens, boundary=boundary, state=state)
        return out, state.breached, out.forward_kl.sum()

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    inputs = random_inputs(2, 3, 50)
    state, expected_state = boundary.new_state(2), boundary.new_state(2)
    for _ in range(2):
        out, *rest = compiled(*inputs, state)
        expected, *expected_rest = score(*inputs, expected_state)
        assert_equal(out, expected)
        assert all(map(torch.equal, rest, expected_rest))
        assert torch.equal(state.counters, expected_state.counters)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_code_that_is_compiled_for_any_size():
    """By the default compiler, which lays out memory itself."""
    compiled = torch.compile(lambda *x: mk.fused_kl_boundary(*x), fullgraph=True, dynamic=True)
    for B, T in ((2, 4), (3, 5)):
        inputs = random_inputs(B, T, 50)
        assert_equal(compiled(*inputs), mk.fused_kl_boundary(*inputs))


def test_buffers_that_are_written_again_are_not_what_autograd_saved(backend):
    inputs = random_inputs(2, 3, 50)
    state = mk.EntropyBoundary().new_state(2)
    out = mk.fused_kl_boundary(*inputs, state=state, backend=backend)
    x = torch.ones(2, 3, requires_grad=True)
    losses = [(x * out.teacher_entropy).sum(), (x[:, :1] * state.scores[:, :1]).sum()]
    mk.fused_kl_boundary(*random_inputs(2, 3, 50, seed=5), out=out, state=state, backend=backend)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_nothing_of_a_transform_outlives_it():
    """Numbers are kept on their device between calls; those that a transform or a fake mode made are not."""
    inputs = random_inputs(2, 3, 50)
    boundary = mk.EntropyBoundary(0.2345, 1.2345)

    def score(x):
        return mk.fused_kl_boundary(*inputs, boundary=boundary).teacher_entropy.sum() * x

    assert torch.func.grad(score)(torch.tensor(1.0)).isfinite()
    expected = mk.fused_kl_boundary(*inputs, boundary=boundary)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        assert mk.fused_kl_boundary(*fakes, boundary=boundary).stray.shape == (2, 3)
    assert_equal(mk.fused_kl_boundary(*inputs, boundary=boundary), expected)


def test_a_trace_sees_the_op():
    """A plain call goes round it."""

    def score(student, teacher, tokens):
        return mk.fused_kl_boundary(student, teacher, tokens).forward_kl

    graph = make_fx(score)(*random_inputs(2, 3, 50)).graph
    assert any(node.target is torch.ops.motab_kernels.fused_kl_boundary.default for node in graph.nodes)


def test_import_needs_torch_alone():
    code = """
import sys
for name in ("transformers", "triton", "numpy", "motab"):
    sys.modules[name] = None
import torch, motab_kernels as mk
out = mk.fused_kl_boundary(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
assert out.forward_kl.item() == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("backend", ["torch", *(["cpu"] if HAS_LIBRARY else [])])
@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-35, 1e35])
def test_a_compiled_call_refuses_temperatures_as_any_other(backend, bad):
    """In a registered op's body a call still looks traced; what is not written must not be returned."""
    student, teacher, tokens = random_inputs(2, 1, 50)
    call = torch.compile(
        lambda *x: mk.fused_kl_boundary(*x[:3], temperature=x[3], backend=backend), backend="aot_eager"
    )
    with pytest.raises(ValueError, match=r"temperature: expected finite values from 1e-30 to 1e\+30"):
        call(student, teacher, tokens, torch.tensor([1.0, bad]))


@pytest.mark.parametrize("backend", ["torch", *(["cpu"] if HAS_LIBRARY else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_temperatures_at_their_bounds(backend, dtype):
    """Which dtypes round differently."""
    student, teacher, tokens = random_inputs(2, 1, 50)
    out = mk.fused_kl_boundary(student, teacher, tokens, temperature=torch.tensor(1e30, dtype=dtype), backend=backend)
    torch.testing.assert_close(out.teacher_logprob, torch.full_like(out.teacher_logprob, -math.log(50)))

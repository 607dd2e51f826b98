"""`fused_kl_boundary` against float64 written from the definition, position by position and step by step."""

import math

import boundary_cases
import pytest
import torch
from boundary_cases import (
    INF,
    NAN,
    STATISTICS,
    assert_equal,
    assert_matches_definition,
    definition,
    eager,
    poisoned_output,
    random_inputs,
)

import motab_kernels as mk
from motab_kernels.reference import boundary as reference

backend = boundary_cases.backend


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

"""`divergence_loss` on every backend; without a GPU, "triton" is Triton's interpreter.

The interpreter takes some milliseconds for a tile whatever its size, so tests choose the lanes: few for the many paths
of a small vocabulary, many for a large one.
"""

import math

import divergence_cases
import pytest
import torch
from divergence_cases import (
    BACKENDS,
    DEVICE,
    KINDS,
    every_kind,
    expected,
    logits,
    options,
    relative_error,
    run,
    set_lanes,
)

import motab_kernels as mk
from motab_kernels.reference import divergence as reference

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
backend = divergence_cases.backend


@every_kind
@pytest.mark.parametrize("V", [1, 7, 64, 128, 300])
def test_definition(backend, kind, V):
    """One column, less than a tile, whole tiles, whole splits, splits with a tail."""
    student, teacher = logits(3, V, seed=V)
    loss, gradient = run(student, teacher, kind, backend=backend)
    expected_loss, expected_gradient = expected(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=1e-6)
    # Of one column the gradient is 0, and 1 - 2^x on a GPU within 2^-22 of it.
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=2e-7 if V > 1 else 2.5e-7)


@pytest.mark.parametrize("kind", ["skew_forward_kl", "skew_reverse_kl", "jsd"])
@pytest.mark.parametrize("alpha", [1e-9, 1e-5])
def test_next_to_no_skew(backend, monkeypatch, kind, alpha):
    """1 - 1e-9 is 1 in float32, and the other's share in the mixture must not be 0 for that."""
    monkeypatch.setitem(KINDS, kind, {"beta": 1 - alpha} if kind == "jsd" else {"alpha": alpha})
    student, teacher = logits(3, 300, seed=6)
    teacher[:, 7] = -60.0  # all but excluded by the teacher alone
    loss, gradient = run(student, teacher, kind, backend=backend)
    expected_loss, expected_gradient = expected(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=1e-6)
    assert relative_error(gradient, expected_gradient) < 1e-5


def test_a_setting_of_another_kind_changes_nothing():
    student, teacher = logits(3, 300, seed=6)
    for kind in KINDS:
        others = {"alpha": 0.0, "beta": 0.0} | options(kind)
        assert mk.divergence_loss(student, teacher, **others) == mk.divergence_loss(student, teacher, **options(kind))


@every_kind
def test_float64_is_computed_in_float64(kind):
    student, teacher = logits(3, 300, dtype=torch.float64, seed=5)
    for x, y in zip(run(student, teacher, kind), expected(student, teacher, kind), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-14)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_rounding_the_exact_result(backend, kind, dtype):
    student, teacher = logits(4, 300, dtype=dtype, seed=1)
    loss, gradient = run(student, teacher, kind, backend=backend)
    expected_loss, expected_gradient = expected(student, teacher, kind)
    assert gradient.dtype == dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=1e-6)
    rounding = relative_error(expected_gradient.to(dtype), expected_gradient)
    assert relative_error(gradient, expected_gradient) < 1.05 * rounding + 1e-6


@every_kind
@pytest.mark.parametrize("noise", [0.03, 0.003])
def test_near_agreement(backend, kind, noise):
    """KL from 1e-6 to 1e-3: where p - q and log p - log q cancel."""
    student, teacher = logits(2, 300, seed=2, noise=noise)
    loss, gradient = run(student, teacher, kind, backend=backend)
    expected_loss, expected_gradient = expected(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=0, atol=5e-7)
    assert relative_error(gradient, expected_gradient) < 1e-3


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_vocabulary(monkeypatch, kind, dtype):
    """Qwen's 151936 columns, nearly agreeing, by every backend: bfloat16 gradients within 0.5 % of float64."""
    student, teacher = logits(1, 151936, dtype=dtype, seed=3, noise=0.05)
    expected_loss, expected_gradient = expected(student, teacher, kind)
    for backend in BACKENDS:
        if backend == "triton":
            set_lanes(monkeypatch, 2048)
        loss, gradient = run(student, teacher, kind, backend=backend)
        torch.testing.assert_close(loss.double(), expected_loss, rtol=0, atol=2e-6)
        assert relative_error(gradient, expected_gradient) < 5e-3


@every_kind
def test_a_constant_added_to_a_side_changes_nothing(backend, kind):
    student, teacher = logits(3, 100, seed=4)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    plain = run(student.float(), teacher.float(), kind, backend=backend)
    shifted = run(student.double().add(1e3).float(), teacher.double().sub(1e3).float(), kind, backend=backend)
    torch.testing.assert_close(shifted[0], plain[0], rtol=0, atol=3e-4)  # of which float32 keeps 6e-5
    torch.testing.assert_close(shifted[1], plain[1], rtol=0, atol=3e-4)


@every_kind
def test_excluded_columns(backend, kind):
    """-inf on both sides is as if the column were not there; on one side it never makes a NaN."""
    student, teacher = logits(4, 40, seed=6)
    out = torch.tensor([3, 17, 39])
    student[0, out], teacher[0, out] = -INF, -INF
    student[1, 5], teacher[2, 6] = -INF, -INF
    loss, gradient = run(student, teacher, kind, backend=backend)
    kept = [i for i in range(40) if i not in out.tolist()]
    expected_loss, expected_gradient = expected(student[:1, kept], teacher[:1, kept], kind)
    torch.testing.assert_close(loss[:1].double(), expected_loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:1, kept].double(), expected_gradient, rtol=1e-5, atol=2e-7)
    assert (gradient[0, out] == 0).all()
    assert gradient[1, 5] == 0
    assert not loss.isnan().any()
    assert not gradient.isnan().any()
    assert loss[1].isinf() == (kind == "forward_kl")
    assert loss[2].isinf() == (kind == "reverse_kl")
    if kind == "reverse_kl":
        assert gradient[2, 6] == INF
        assert (gradient[2, :6] <= 0).all()
    else:
        assert gradient[2].isfinite().all()


@pytest.mark.parametrize("kind", [{"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 1.0}, {"alpha": 0.0}])
@pytest.mark.parametrize("low", [-120.0, -1e4, torch.finfo(torch.float32).min])
def test_a_column_that_the_student_never_writes_pulls_at_nothing(backend, kind, low):
    """Though the teacher excludes it: where the loss is finite, so is the gradient."""
    student, teacher = logits(2, 40, seed=6)
    student[:, 3:9], teacher[:, 3:9] = low, -INF
    settings = {"divergence": "skew_reverse_kl"} | kind
    student = student.to(DEVICE).requires_grad_()
    loss = mk.divergence_loss(student, teacher.to(DEVICE), **settings, reduction="none", backend=backend)
    loss.sum().backward()
    kept = [0, 1, 2, *range(9, 40)]
    expected_loss, expected_gradient = expected(student.detach().cpu()[:, kept], teacher[:, kept], "reverse_kl")
    torch.testing.assert_close(loss.detach().cpu().double(), expected_loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(student.grad.cpu()[:, kept].double(), expected_gradient, rtol=1e-5, atol=2e-7)
    assert (student.grad[:, 3:9] == 0).all()


def test_far_apart(backend):
    """Logits 300 apart: probabilities that float32 does not know."""
    teacher = torch.tensor([[0.0, -300.0, 1.0, -120.0]])
    student = torch.tensor([[-300.0, 0.0, -110.0, 2.0]])
    for kind in KINDS:
        loss, gradient = run(student, teacher, kind, backend=backend)
        expected_loss, expected_gradient = expected(student, teacher, kind)
        torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_position_without_a_softmax_is_nan_and_alone(backend, kind, bad, side):
    student, teacher = logits(3, 70, seed=7)
    clean = run(student, teacher, kind, backend=backend)
    (student if side == "student" else teacher)[1, 66] = bad
    loss, gradient = run(student, teacher, kind, backend=backend)
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    for i in (0, 2):
        torch.testing.assert_close(loss[i], clean[0][i], rtol=0, atol=0)
        torch.testing.assert_close(gradient[i], clean[1][i], rtol=0, atol=0)


@every_kind
def test_no_finite_logit(backend, kind):
    student, teacher = logits(2, 30, seed=8)
    teacher[1] = -INF
    loss, gradient = run(student, teacher, kind, backend=backend)
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    assert not loss[0].isnan()


@every_kind
def test_equal_logits(backend, kind):
    """No divergence and no gradient, also for tvd, whose slope at a tie is 0."""
    student, _ = logits(2, 50, seed=9)
    loss, gradient = run(student, student.detach().clone(), kind, backend=backend)
    torch.testing.assert_close(loss, torch.zeros(2), rtol=0, atol=2e-7)
    torch.testing.assert_close(gradient, torch.zeros(2, 50), rtol=0, atol=1e-8)
    if kind == "tvd":
        assert (gradient == 0).all()


@every_kind
def test_a_row_does_not_depend_on_its_batch(backend, kind):
    student, teacher = logits(5, 200, dtype=torch.bfloat16, seed=10)
    together = run(student, teacher, kind, backend=backend)
    for i in range(5):
        alone = run(student[i : i + 1], teacher[i : i + 1], kind, backend=backend)
        assert torch.equal(alone[0], together[0][i : i + 1])
        assert torch.equal(alone[1], together[1][i : i + 1])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_sums_of_slices_merge_to_those_of_the_whole(kind):
    """Slices that hold no finite logit, of either side or of both, among them."""
    student, teacher = logits(3, 1, 60, dtype=torch.float64, seed=19)
    student[0, :, :20] = teacher[0, :, :20] = -INF
    teacher[1, :, 20:40] = -INF
    student[2, :, 40:] = teacher[2, :, 40:] = -INF
    tau = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    arguments = (tau, None, kind)
    parts = [
        reference.divergence_sums(student[..., i : i + 20], teacher[..., i : i + 20], *arguments) for i in (0, 20, 40)
    ]
    merged = reference.finish(torch.cat(parts, -1), *arguments, 1)
    whole = reference.finish(reference.divergence_sums(student, teacher, *arguments), *arguments, 1)
    torch.testing.assert_close(merged, whole)
    assert not merged[0].isnan().any()

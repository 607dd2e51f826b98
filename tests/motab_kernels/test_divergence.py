"""`divergence_loss` on every backend; without a GPU, "triton" is Triton's interpreter.

The interpreter takes some milliseconds for a tile whatever its size, so tests choose the lanes: few for the many paths
of a small vocabulary, many for a large one.
"""

import math
import os

import numpy as np
import pytest
import torch
from divergence_cases import KINDS, definition, every_kind, expected, logits, options, relative_error

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY, HAS_TRITON
from motab_kernels.divergence import divergence_backward_op, divergence_op
from motab_kernels.reference import divergence as reference

INF, NAN = math.inf, math.nan
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", *(["cpu"] if HAS_LIBRARY else []), *(["triton"] if HAS_TRITON else [])]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Triton with 4 lanes of 16 columns a tile, two tiles a split."""
    if request.param == "triton":
        set_lanes(monkeypatch, 4)
    return request.param


def set_lanes(monkeypatch, lanes):
    from motab_kernels.gpu import divergence as gpu

    warps = 4 if lanes >= 128 else 1
    monkeypatch.setattr(gpu, "settings_for", lambda device: gpu.Settings(lanes=lanes, tiles=2, num_warps=warps, rows=4))


def run(student, teacher, kind, upstream=None, **keywords):
    """Each position's loss and the gradient of their (weighted) sum."""
    student = student.to(DEVICE, copy=True).requires_grad_()
    keywords = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
    loss = mk.divergence_loss(student, teacher.to(DEVICE), **options(kind), reduction="none", **keywords)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(DEVICE))
    return loss.detach().cpu(), student.grad.cpu()


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
    student, teacher = logits(4, 500, seed=2, noise=noise)
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
def test_options_together(backend, kind):
    """Padded rows, vocabularies of different size, a temperature a row, a mask over NaN, weights, an upstream."""
    generator = torch.Generator().manual_seed(5)
    B, T, V = 3, 5, 90
    student, teacher = logits(B, T, V, seed=5)
    wide_student = torch.full((B, T + 2, V + 17), NAN)
    wide_teacher = torch.full((B, T + 1, V + 5), NAN)
    wide_student[:, :T, :V], wide_teacher[:, 1:, :V] = student, teacher
    mask = torch.rand(B, T, generator=generator) < 0.7
    wide_student[:, :T][~mask] = NAN
    weights, upstream = torch.rand(B, T, generator=generator), torch.randn(B, T, generator=generator)
    tau = torch.tensor([0.7, 1.0, 2.5])

    leaf = wide_student.clone().to(DEVICE).requires_grad_()
    loss = mk.divergence_loss(
        leaf[:, :T],
        wide_teacher.to(DEVICE)[:, 1:],
        **options(kind),
        reduction="none",
        temperature=tau.to(DEVICE),
        mask=mask.to(DEVICE),
        weights=weights.to(DEVICE),
        vocab_size=V,
        backend=backend,
    )
    loss.backward(upstream.to(DEVICE))
    reference = student.double().requires_grad_()
    rows = definition(reference.flatten(0, 1), teacher.flatten(0, 1), kind, tau.repeat_interleave(T)[:, None])
    rows = (rows.view(B, T) * weights).masked_fill(~mask, 0)
    rows.backward(upstream.double())
    torch.testing.assert_close(loss.detach().cpu().double(), rows.detach(), rtol=5e-6, atol=1e-6)
    gradient = leaf.grad.cpu().double()
    torch.testing.assert_close(gradient[:, :T, :V], reference.grad, rtol=1e-5, atol=5e-7)
    gradient[:, :T, :V] = 0
    assert (gradient == 0).all()


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


def test_reductions(backend):
    student, teacher = logits(3, 4, 20, seed=11)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    rows = mk.divergence_loss(student, teacher, mask=mask, reduction="none", backend="torch")

    def reduced(**keywords):
        device = {"mask": mask.to(DEVICE), "backend": backend}
        return mk.divergence_loss(student.to(DEVICE), teacher.to(DEVICE), **device, **keywords).cpu()

    assert rows.shape == (3, 4)
    torch.testing.assert_close(reduced(reduction="sum"), rows.sum())
    torch.testing.assert_close(reduced(), rows.sum() / 5)
    torch.testing.assert_close(reduced(reduction="batchmean"), rows.sum() / 3)
    torch.testing.assert_close(reduced(num_items=40), rows.sum() / 40)
    torch.testing.assert_close(reduced(num_items=torch.tensor(40)), rows.sum() / 40)
    torch.testing.assert_close(reduced(num_items=np.int64(40)), rows.sum() / 40)
    torch.testing.assert_close(reduced(num_items=torch.tensor(2.5).double()), rows.sum() / 2.5)  # in float32
    masked = {"mask": torch.zeros_like(mask).to(DEVICE), "num_items": torch.tensor(0), "backend": backend}
    assert mk.divergence_loss(student.to(DEVICE), teacher.to(DEVICE), **masked) == 0


def test_expanded_mask_and_upstream(backend):
    """Tensors with strides of 0, as the backward pass of a sum makes them."""
    student, teacher = logits(2, 3, 20, seed=12)
    mask = torch.tensor([True, False, True])
    leaf = student.to(DEVICE, copy=True).requires_grad_()
    mk.divergence_loss(leaf, teacher.to(DEVICE), mask=mask.to(DEVICE).expand(2, 3), backend=backend).backward()
    _, gradient = expected(student.flatten(0, 1), teacher.flatten(0, 1), "forward_kl")
    gradient = gradient.view(2, 3, 20) * mask[None, :, None] / 4
    torch.testing.assert_close(leaf.grad.cpu().double(), gradient, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_to_the_batch(backend):
    student, teacher = (x.to(DEVICE) for x in logits(4, 3, 20, seed=12))
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    whole = mk.divergence_loss(student, teacher, mask=mask, backend=backend)
    parts = [
        mk.divergence_loss(student[i], teacher[i], mask=mask[i], num_items=mask.sum(), backend=backend)
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0, 3, 9)])
def test_empty_batch(backend, shape):
    student = torch.zeros(shape, device=DEVICE, requires_grad=True)
    for reduction in ("batchmean", "mean"):
        loss = mk.divergence_loss(student, torch.zeros(shape, device=DEVICE), reduction=reduction, backend=backend)
        loss.backward()
        assert loss == 0
    assert student.grad.shape == shape


@every_kind
def test_a_mask_of_no_tokens(backend, kind):
    student = torch.full((2, 9), NAN, device=DEVICE, requires_grad=True)
    mask = torch.zeros(2, dtype=torch.bool, device=DEVICE)
    loss = mk.divergence_loss(student, student.detach(), **options(kind), mask=mask, backend=backend)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


@every_kind
def test_weights_of_one_change_no_gradient(backend, kind):
    """Where both sides nearly agree the loss rounds to 0, and its gradient does not."""
    student, teacher = (x.to(DEVICE) for x in logits(5, 200, seed=16, noise=1e-4))
    gradients = []
    for weights in (None, torch.ones(5, device=DEVICE)):
        leaf = student.clone().requires_grad_()
        mk.divergence_loss(leaf, teacher, **options(kind), weights=weights, backend=backend).backward()
        gradients.append(leaf.grad)
    assert (gradients[0].abs().amax(-1) > 0).all()
    assert torch.equal(*gradients)


@every_kind
def test_weights_at_masked_positions_do_not_count(backend, kind):
    student, teacher = (x.to(DEVICE) for x in logits(3, 50, seed=17))
    mask, weights = torch.tensor([True, False, True]), torch.tensor([2.0, NAN, 0.0])
    leaf = student.clone().requires_grad_()
    loss = mk.divergence_loss(
        leaf, teacher, **options(kind), mask=mask.to(DEVICE), weights=weights.to(DEVICE), backend=backend
    )
    loss.backward()
    _, gradient = run(student[:1], teacher[:1], kind, backend=backend)
    torch.testing.assert_close(leaf.grad[:1].cpu(), gradient)  # twice, over two positions
    assert (leaf.grad[1:] == 0).all()


@every_kind
def test_inplace_backward(backend, kind, monkeypatch):
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter copies each argument, so that no two are one tensor")
    if backend == "triton":
        set_lanes(monkeypatch, 128)  # one a thread: a thread must not read what another has written over
    student, teacher = logits(3, 2, 5000, dtype=torch.bfloat16, seed=13)
    _, gradient = run(student, teacher, kind, backend=backend)
    leaf = student.to(DEVICE, copy=True).requires_grad_()
    head = leaf * 1  # as a language-model head: the graph does not need its output again
    loss = mk.divergence_loss(
        head, teacher.to(DEVICE), **options(kind), reduction="sum", inplace_backward=True, backend=backend
    )
    loss.backward(retain_graph=True)
    assert torch.equal(head.detach().cpu(), gradient)
    assert torch.equal(leaf.grad.cpu(), gradient)
    with pytest.raises(ValueError, match="expected one backward pass with inplace_backward"):
        loss.backward()  # the logits are gone, and no second gradient can be wrong in silence


def test_inplace_backward_leaves_logits_that_the_teacher_s_overlap(backend):
    """A target network's logits as shifted views of the student's own."""
    line = logits(2, 6, 40, seed=19)[0].to(DEVICE)
    gradients = []
    for inplace in (False, True):
        leaf = line.clone().requires_grad_()
        head = leaf * 1
        mk.divergence_loss(head[:, 1:], head.detach()[:, :-1], inplace_backward=inplace, backend=backend).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_was_made_in_inference_mode(backend, reduction):
    student, teacher = (x.to(DEVICE) for x in logits(4, 3, 40, seed=20))
    mask, weights = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(20)).to(DEVICE)
    with torch.inference_mode():
        made = [torch.stack((torch.zeros_like(x), x), 1)[:, 1] for x in (teacher, mask > 0.2, weights)]
    results = []
    for other, keep, worth in ((teacher, mask > 0.2, weights), made):
        leaf = student.clone().requires_grad_()
        loss = mk.divergence_loss(leaf, other, mask=keep, weights=worth, reduction=reduction, backend=backend)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_inplace_backward_leaves_logits_that_share_memory(backend):
    """Rows of an unfolded tensor: one's gradient would be written over another's."""
    generator = torch.Generator().manual_seed(18)
    line, teacher = torch.randn(60, generator=generator).to(DEVICE), torch.randn(3, 50, generator=generator).to(DEVICE)
    gradients = []
    for inplace in (False, True):
        leaf = line.clone().requires_grad_()
        logits = (leaf * 1).unfold(0, 50, 5)
        mk.divergence_loss(logits, teacher, divergence="jsd", inplace_backward=inplace, backend=backend).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@every_kind
def test_saves_24_bytes_a_position_beyond_the_logits(backend, kind):
    student, teacher = logits(8, 100, seed=14)
    student, teacher = student.to(DEVICE).requires_grad_(), teacher.to(DEVICE)
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mk.divergence_loss(student, teacher, **options(kind), backend=backend)
    inputs = {student.data_ptr(), teacher.data_ptr()}
    assert sum(x.nbytes for x in saved if x.data_ptr() not in inputs) == 24 * 8


@every_kind
@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_gradcheck(kind, tau):
    student, teacher = logits(3, 6, dtype=torch.float64, seed=15)
    mask = torch.tensor([True, False, True])

    def loss(x):
        return mk.divergence_loss(x, teacher, **options(kind), temperature=tau, mask=mask, backend="torch")

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_registered(kind):
    student, teacher = logits(2, 3, 10, seed=16)
    mask = torch.tensor([[True, False, True]] * 2)
    tau = torch.tensor(1.5)
    arguments = (student.requires_grad_(), teacher, mask, tau, kind, 0.5, 9, False, False, "torch")
    torch.library.opcheck(divergence_op, arguments)
    saved = divergence_op(*arguments)[1].detach()
    backward = (torch.ones(2, 3), student.detach(), teacher, mask, tau, saved, kind, 0.5, 9, True, "torch")
    torch.library.opcheck(divergence_backward_op, backward)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph():
    student, teacher = logits(2, 3, 10, seed=17)
    mask = torch.tensor([[True, False, True]] * 2)

    def loss(x, temperature, teacher=teacher):
        return mk.divergence_loss(
            x * 2,
            teacher,
            divergence="jsd",
            temperature=temperature,
            mask=mask,
            inplace_backward=True,
            check_finite=True,
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperature in (1.3, 2.0, 0.7):  # from the second on a number that varies
        results = []
        for call in (loss, compiled):
            x = student.clone().requires_grad_()
            value = call(x, temperature)
            value.backward()
            results.append((value.detach(), x.grad))
        torch.testing.assert_close(results[1], results[0])
    with pytest.raises(ValueError, match="4 of 6 positions with NaN or inf, the first 0"):
        compiled(student.clone().requires_grad_(), 0.7, teacher * NAN).backward()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_matter(backend, kind, dtype):
    student, teacher = logits(2, 100, seed=19)
    before = run(student, teacher, kind, backend=backend)
    torch.set_default_dtype(dtype)
    try:
        after = run(student, teacher, kind, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y.float(), x, rtol=1e-5, atol=1e-7)


def test_a_second_derivative_is_refused(backend):
    """It would be wrong, or missing in silence."""
    student, teacher = (x.to(DEVICE) for x in logits(2, 10))
    loss = mk.divergence_loss(student.requires_grad_(), teacher, backend=backend)
    with pytest.raises(ValueError, match=r"divergence_loss: expected a backward pass .* got create_graph=True"):
        torch.autograd.grad(loss, student, create_graph=True)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by jvp itself
def test_a_forward_mode_derivative_is_refused():
    """Which came out as 0."""
    student, teacher = logits(3, 20, seed=20)
    loss = lambda x: mk.divergence_loss(x, teacher)  # noqa: E731
    assert loss(student) > 0
    with pytest.raises(ValueError, match=r"divergence_loss: expected no forward-mode .* backward\(\)"):
        torch.func.jvp(loss, (student,), (torch.ones_like(student),))
    with torch.autograd.forward_ad.dual_level():
        assert loss(student) > 0


def test_logits_that_share_memory_are_not_written_over(backend):
    student, teacher = logits(3, 40, seed=20)
    row = student[:1].to(DEVICE).requires_grad_()
    for inplace in (False, True):
        loss = mk.divergence_loss(
            row.expand(3, 40), teacher.to(DEVICE), inplace_backward=inplace, reduction="sum", backend=backend
        )
        loss.backward()
    torch.testing.assert_close(
        row.grad.cpu().double() / 2,
        expected(row.detach().cpu().expand(3, 40), teacher, "forward_kl")[1].sum(0, True),
        rtol=1e-5,
        atol=1e-6,
    )


def test_check_finite(backend):
    student, teacher = logits(2, 3, 10, seed=18)
    teacher[1, 1, 4] = NAN
    student, teacher = student.to(DEVICE).requires_grad_(), teacher.to(DEVICE)
    loss = mk.divergence_loss(student, teacher, check_finite=True, backend=backend)
    with pytest.raises(ValueError, match="1 of 6 positions with NaN or inf, the first 4"):
        loss.backward()


def test_the_teacher_gets_no_gradient_in_silence():
    student, teacher = logits(2, 10)
    with pytest.raises(ValueError, match=r"teacher_logits: expected a tensor without gradient.*torch\.no_grad"):
        mk.divergence_loss(student, teacher.requires_grad_())
    with torch.no_grad():
        assert mk.divergence_loss(student, teacher).isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, r"divergence: expected one of forward_kl, .*tvd, got 'kl'"),
        ({"divergence": "jsd", "beta": 1.5}, "beta: expected 0 to 1, got 1.5"),
        ({"divergence": "jsd", "beta": -0.5}, "beta: expected 0 to 1, got -0.5"),
        ({"alpha": 1.0}, "alpha: expected at least 0 and below 1, got 1.0"),
        ({"alpha": -0.1}, "alpha: expected at least 0 and below 1, got -0.1"),
        ({"temperature": 0.0}, r"temperature: expected a finite number from 1e-30 to 1e\+30, got 0.0"),
        ({"divergence": "jsd", "beta": "a"}, "beta: expected a finite number, got 'a'"),
        ({"alpha": None}, "alpha: expected a finite number, got None"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature: expected finite values from 1e-30 to 1e\+30"),
        ({"temperature": torch.tensor(2.0, requires_grad=True)}, "temperature: expected a tensor without gradient"),
        ({"temperature": 1e-40}, "temperature: expected .* from 1e-30 to 1e.30, got 1e-40"),
        ({"temperature": torch.ones(3)}, r"0-d or \(2,\), on cpu, got shape \(3,\)"),
        ({"reduction": "avg"}, "reduction: expected one of none, sum, mean, batchmean, got 'avg'"),
        ({"reduction": "sum", "num_items": 3}, 'num_items: expected None with reduction "sum"'),
        ({"num_items": 0}, r"num_items: expected a finite number from 1e-30 to 1e\+30, got 0"),
        ({"num_items": INF}, r"num_items: expected a finite number from 1e-30 to 1e\+30, got inf"),
        ({"num_items": True}, "num_items: expected a number or a tensor, got bool"),
        ({"num_items": torch.tensor(-2)}, "num_items: expected a number >= 0, got -2"),
        ({"num_items": torch.tensor(True)}, "num_items: .* or a 0-d tensor of one, got torch.bool"),
        ({"num_items": torch.tensor(1j)}, "num_items: .* or a 0-d tensor of one, got torch.complex64"),
        ({"num_items": torch.ones(2)}, r"num_items: .* a 0-d tensor of one, got torch.float32 of shape \(2,\)"),
        ({"mask": torch.ones(2)}, r"mask: expected bool of shape \(2,\) on cpu, got torch.float32"),
        ({"mask": torch.ones(2, device="meta").bool()}, r"mask: expected bool of shape \(2,\) on cpu, got .* on meta"),
        ({"weights": torch.ones(3)}, r"weights: expected floating-point of shape \(2,\).*shape \(3,\)"),
        ({"weights": torch.ones(2, requires_grad=True)}, "weights: expected a tensor without gradient"),
        ({"num_items": torch.tensor(2.0, requires_grad=True)}, "num_items: expected a tensor without gradient"),
        ({"vocab_size": 0}, "vocab_size: expected an integer >= 1, got 0"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"student_logits": torch.ones(2, 10).int()}, "student_logits: expected float32.*got torch.int32"),
        ({"student_logits": torch.ones(10)}, r"student_logits: expected shape \(B, V\) or \(B, T, V\), got \(10,\)"),
        (
            {"student_logits": torch.ones(2, 10).to_sparse()},
            "student_logits: expected a dense tensor, got torch.sparse",
        ),
        ({"teacher_logits": torch.ones(3, 10)}, r"teacher_logits: expected .*\(2, 'V'\).*got \(3, 10\)"),
        ({"teacher_logits": torch.ones(2, 10, device="meta")}, "teacher_logits: expected .* on cpu, got .* on meta"),
        ({"teacher_logits": torch.ones(2, 0)}, "expected a shared vocabulary, got 10 and 0 columns"),
    ],
)
def test_bad_input(change, message):
    student, teacher = logits(2, 10)
    arguments = {"student_logits": student, "teacher_logits": teacher} | change
    with pytest.raises(ValueError, match=message):
        mk.divergence_loss(arguments.pop("student_logits"), arguments.pop("teacher_logits"), **arguments)


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

"""`fused_linear_divergence` against `divergence_loss` of materialised logits, and against float64."""

import contextlib
import functools
import weakref

import pytest
import torch
from divergence_cases import every_kind, options, relative_error
from torch.utils.checkpoint import checkpoint

import motab_kernels as mk
from motab_kernels import linear_head
from motab_kernels.backend import HAS_LIBRARY, HAS_TRITON
from motab_kernels.linear_divergence import positions_op, total_op
from motab_kernels.linear_head import Head, HeadDivergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", *(["cpu"] if HAS_LIBRARY else []), *(["triton"] if HAS_TRITON else [])]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "triton":
        from motab_kernels.gpu import divergence as gpu

        monkeypatch.setattr(gpu, "settings_for", lambda device: gpu.Settings(lanes=8, tiles=2, rows=4))
    return request.param


def heads(N=7, H=12, H_teacher=20, V=100, V_teacher=110, dtype=torch.float64, seed=0):
    """Hidden states, weight and bias of both sides; logits a few nats wide."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = random(N, H), random(V, H) * 0.6, random(V) * 0.3
    teacher = random(N, H_teacher), random(V_teacher, H_teacher) * 0.5, random(V_teacher) * 0.3
    return [x.to(dtype).to(DEVICE) for x in student], [x.to(dtype).to(DEVICE) for x in teacher]


def fused(student, teacher, **keywords):
    leaves = [x.clone().requires_grad_() for x in student]
    loss = mk.fused_linear_divergence(
        *leaves[:2], *teacher[:2], student_bias=leaves[2], teacher_bias=teacher[2], **keywords
    )
    return loss, leaves


def materialised(student, teacher, scales=(1.0, 1.0), softcaps=(None, None), **keywords):
    """The equivalent expression, in float64."""
    leaves = [x.double().requires_grad_() for x in student]
    logits = []
    for (hidden, weight, bias), scale, cap in zip(
        (leaves, [x.double() for x in teacher]), scales, softcaps, strict=True
    ):
        x = scale * (hidden @ weight.T + bias)
        logits.append(x if cap is None else cap * torch.tanh(x / cap))
    return mk.divergence_loss(*logits, **keywords, backend="torch"), leaves


def assert_same(found, expected, upstream=None, rtol=1e-5, atol=1e-6):
    (loss, leaves), (expected_loss, expected_leaves) = found, expected
    torch.testing.assert_close(loss.double(), expected_loss, rtol=rtol, atol=atol)
    loss.backward(None if upstream is None else upstream.to(loss.dtype))
    expected_loss.backward(upstream)
    for x, y in zip(leaves, expected_leaves, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=rtol, atol=atol)


@every_kind
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_size", [3, None])
def test_definition(backend, kind, reduction, chunk_size):
    """Chunks with a remainder, and one chunk; vocabularies of different size."""
    student, teacher = heads(dtype=torch.float32)
    settings = options(kind) | {"reduction": reduction}
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64, device=DEVICE) if reduction == "none" else None
    found = fused(student, teacher, **settings, chunk_size=chunk_size, backend=backend)
    assert_same(found, materialised(student, teacher, **settings), upstream)


@every_kind
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_options_together(backend, kind, reduction):
    student, teacher = heads(N=8, dtype=torch.float32, seed=1)
    student[0], teacher[0] = student[0].view(2, 4, -1), teacher[0].view(2, 4, -1)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]], device=DEVICE).bool()
    weights = torch.rand(2, 4, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    shared = options(kind) | {
        "mask": mask,
        "weights": weights,
        "temperature": torch.tensor([0.7, 1.9], device=DEVICE),
        "vocab_size": 90,
        "reduction": reduction,
    }
    caps = {"student_logit_scale": 0.7, "teacher_logit_scale": 1.2, "student_softcap": 3.0, "teacher_softcap": 5.0}
    found = fused(student, teacher, **shared, **caps, chunk_size=3, backend=backend)
    expected = materialised(student, teacher, (0.7, 1.2), (3.0, 5.0), **shared)
    upstream = torch.randn(2, 4, dtype=torch.float64, device=DEVICE) if reduction == "none" else None
    assert_same(found, expected, upstream)


@every_kind
def test_weights_of_one_change_no_gradient(kind):
    """Where both sides nearly agree the loss rounds to 0, and its gradient does not."""
    student, _ = heads(dtype=torch.float32)
    teacher = [student[0] + 1e-4, *student[1:]]
    found = fused(student, teacher, **options(kind), reduction="none", weights=torch.ones(7, device=DEVICE))
    expected = fused(student, teacher, **options(kind), reduction="none")
    for loss, _ in (found, expected):
        loss.sum().backward()
    for x, y in zip(found[1], expected[1], strict=True):
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("by", "reduction"), [("mask", "sum"), ("weights", "sum"), ("mask", "none")])
@pytest.mark.parametrize(("kind", "dtype"), [("forward_kl", torch.float16), ("jsd", torch.float32)])
def test_positions_that_do_not_count_may_be_nan(backend, kind, softcap, by, reduction, dtype):
    """As attention leaves those that see nothing."""
    student, teacher = heads(N=5, dtype=dtype)
    counted = torch.tensor([True, False, True, False, True], device=DEVICE)
    student[0][1], teacher[0][3], student[0][3] = torch.nan, torch.nan, torch.inf
    settings = {**options(kind), "reduction": reduction, "student_softcap": softcap, "backend": backend}
    where = {"mask": counted} if by == "mask" else {"weights": counted.float()}
    found = fused(student, teacher, **settings, **where, check_finite=True, chunk_size=2)
    expected = fused([student[0][counted], *student[1:]], [teacher[0][counted], *teacher[1:]], **settings)
    for loss, _ in (found, expected):
        loss.sum().backward()
    torch.testing.assert_close(found[0].sum(), expected[0].sum())
    assert (found[1][0].grad[~counted] == 0).all()
    torch.testing.assert_close(found[1][0].grad[counted], expected[1][0].grad)
    for x, y in zip(found[1][1:], expected[1][1:], strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


def test_upstream_and_accumulation():
    """A loss that is scaled before the backward pass, and gradients that add to what is there."""
    student, teacher = heads()
    loss, leaves = fused(student, teacher, chunk_size=4)
    (3 * loss).backward()
    expected_loss, expected_leaves = materialised(student, teacher)
    expected_loss.backward()
    for x, y in zip(leaves, expected_leaves, strict=True):
        torch.testing.assert_close(x.grad, 3 * y.grad)


def test_no_second_backward_pass_in_silence():
    loss, _ = fused(*heads())
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="expected one backward pass, which hands out the gradients in place"):
        loss.backward()


def leaves_of(student):
    return [x.clone().requires_grad_() for x in student]


def gradients_of(loss_of, student, around=contextlib.nullcontext):
    """`around`: what the backward pass runs in."""
    leaves = leaves_of(student)
    loss = loss_of(*leaves)
    with around():
        loss.backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointed(reduction):
    student, teacher = heads()

    def loss(hidden, weight, bias):
        return mk.fused_linear_divergence(
            hidden, weight, *teacher[:2], student_bias=bias, reduction=reduction, chunk_size=3
        ).sum()

    for use_reentrant in (False, True):
        found = gradients_of(lambda *x, way=use_reentrant: checkpoint(loss, *x, use_reentrant=way), student)
        torch.testing.assert_close(found, gradients_of(loss, student), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backward_pass_under_autocast_is_in_float32_too(reduction):
    student, teacher = heads(dtype=torch.float32)

    def loss(hidden, weight, bias):
        return mk.fused_linear_divergence(hidden, weight, *teacher[:2], student_bias=bias, reduction=reduction).sum()

    lower = functools.partial(torch.autocast, DEVICE, torch.bfloat16)
    torch.testing.assert_close(gradients_of(loss, student, lower), gradients_of(loss, student), rtol=0, atol=0)


def test_saved_tensors_that_are_kept_elsewhere_are_handed_out_once():
    """Under hooks autograd does not see that they have changed."""
    student, teacher = heads()
    leaves = leaves_of(student)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        loss = mk.fused_linear_divergence(*leaves[:2], *teacher[:2], student_bias=leaves[2])
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="expected one backward pass"):
        loss.backward()


def test_a_teacher_in_inference_mode():
    student, teacher = heads()
    with torch.inference_mode():
        made = [x.clone() for x in teacher]
    for reduction in ("mean", "none"):

        def loss(hidden, weight, bias, teacher, reduction=reduction):
            options = {"student_bias": bias, "teacher_bias": teacher[2], "reduction": reduction}
            return mk.fused_linear_divergence(hidden, weight, *teacher[:2], **options).sum()

        found, expected = (gradients_of(functools.partial(loss, teacher=x), student) for x in (made, teacher))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_mask_and_weights_as_they_may_come(backend, reduction):
    """A mask with gaps, or made in inference mode; weights that are NaN where it is False."""
    student, teacher = heads(dtype=torch.float32)
    mask = torch.arange(7, device=DEVICE) % 3 != 1
    weights = torch.linspace(0.5, 2, 7, device=DEVICE)
    with torch.inference_mode():
        made = mask.clone()

    def results(mask, weights):
        settings = {"reduction": reduction, "chunk_size": 3, "backend": backend}
        loss, leaves = fused(student, teacher, mask=mask, weights=weights, **settings)
        loss.sum().backward()
        return loss.detach(), *(x.grad for x in leaves)

    for given in (torch.stack((~mask, mask), 1)[:, 1], made):
        found = results(given, weights.masked_fill(~mask, torch.nan))
        torch.testing.assert_close(found, results(mask, weights), rtol=0, atol=0)


def test_no_gradient_is_computed_that_nobody_asks_for(monkeypatch):
    student, teacher = heads()
    expected, _ = fused(student, teacher)
    monkeypatch.setattr(HeadDivergence, "write_gradient", None)
    with torch.no_grad():
        loss, _ = fused(student, teacher)
    assert loss == expected


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_asks_for_no_gradient_gets_none(frozen, reduction):
    student, teacher = heads()
    leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(student)]
    teacher[1].requires_grad_()  # a head that nobody froze
    loss = mk.fused_linear_divergence(*leaves[:2], *teacher[:2], student_bias=leaves[2], reduction=reduction)
    loss.sum().backward()
    assert [x.grad is None for x in leaves] == [i == frozen for i in range(3)]
    assert teacher[1].grad is None


def test_tied_weight():
    """A head that is the embedding too: both gradients add up."""
    student, teacher = heads()
    tokens = torch.arange(7, device=DEVICE)
    grads = []
    for call in ("fused", "materialised"):
        weight = student[1].clone().requires_grad_()
        hidden = torch.tanh(weight[tokens])
        if call == "fused":
            loss = mk.fused_linear_divergence(hidden, weight, *teacher[:2], chunk_size=2)
        else:
            loss = mk.divergence_loss(hidden @ weight.T, teacher[0] @ teacher[1].T)
        loss.backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


@every_kind
def test_low_precision_is_no_worse_than_eager(kind):
    """Eager: the same expression in bfloat16, with the softmax in float32."""
    student, teacher = heads(N=64, H=64, H_teacher=64, V=1000, V_teacher=1000, dtype=torch.bfloat16, seed=3)
    student[1], teacher[1] = student[1] / 2, teacher[1] / 2
    materialised_loss, exact = materialised(student, teacher, **options(kind))
    materialised_loss.backward()
    leaves = [x.clone().requires_grad_() for x in student]
    eager_logits = leaves[0] @ leaves[1].T + leaves[2], teacher[0] @ teacher[1].T + teacher[2]
    mk.divergence_loss(*eager_logits, **options(kind), backend="torch").backward()
    loss, ours = fused(student, teacher, **options(kind), chunk_size=8)
    loss.backward()
    for mine, eager, true in zip(ours, leaves, exact, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        assert relative_error(mine.grad, true.grad) < 1.1 * relative_error(eager.grad, true.grad) + 2e-3


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_near_agreement(kind, dtype, monkeypatch):
    """Logits rounded to 16 bits would leave the gradients 5 to 50 % off here, and the loss more."""
    monkeypatch.setattr(linear_head, "SLICE", 300)
    (hidden, weight, bias), _ = heads(N=64, H=64, V=1000, seed=4)
    weight, generator = weight / 2, torch.Generator().manual_seed(4)
    apart = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    student = [x.to(dtype) for x in (hidden, weight, bias)]
    teacher = [x.to(dtype) for x in (hidden + 0.03 * apart, weight, bias)]
    expected_loss, exact = materialised(student, teacher, **options(kind), reduction="sum")
    expected_loss.backward()
    loss, ours = fused(student, teacher, **options(kind), reduction="sum", chunk_size=8)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected_loss.detach(), rtol=2e-3, atol=0)
    for mine, true in zip(ours, exact, strict=True):
        assert mine.grad.dtype == dtype
        assert relative_error(mine.grad, true.grad) < 5e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_float16_with_a_gradient_scaler(kind, reduction):
    """A position's gradient is one of thousands, and 65536 is more than float16 holds; all pull at one column."""
    student, teacher = heads(N=4096, H=32, V=1500, V_teacher=1500, dtype=torch.float16, seed=8)
    student[0] += 1
    teacher = [student[0] + 0.5 * teacher[0][:, :12].repeat(1, 3)[:, :32], *student[1:]]
    teacher[2] = teacher[2].clone()
    teacher[2][5] += 12
    _, exact = expected = materialised(student, teacher, **options(kind))
    expected[0].backward(torch.tensor(65536.0, dtype=torch.float64, device=DEVICE))
    loss, ours = fused(student, teacher, **options(kind), reduction=reduction)
    (loss if reduction == "mean" else loss.mean()).backward(torch.tensor(65536.0, device=DEVICE))
    for mine, true in zip(ours, exact, strict=True):
        assert mine.grad.dtype == torch.float16
        assert relative_error(mine.grad, true.grad) < 5e-3


def test_float16_of_a_sum_that_is_scaled_up():
    """By more than float16 holds, for gradients that are small."""
    student, _ = heads(dtype=torch.float16)
    teacher = [student[0], student[1], student[2].clone()]
    teacher[2][5] += 0.003
    upstream = torch.tensor(2.0**25, device=DEVICE)
    expected_loss, exact = materialised(student, teacher, reduction="sum")
    expected_loss.backward(upstream.double())
    loss, ours = fused(student, teacher, reduction="sum")
    loss.backward(upstream)
    for mine, true in zip(ours, exact, strict=True):
        assert relative_error(mine.grad, true.grad) < 5e-3


def test_a_second_derivative_is_refused():
    student, teacher = heads(dtype=torch.float32)
    for reduction in ("mean", "none"):
        loss, leaves = fused(student, teacher, reduction=reduction)
        with pytest.raises(ValueError, match=r"fused_linear_divergence: expected .* got create_graph=True"):
            torch.autograd.grad(loss.sum(), leaves, create_graph=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by jvp itself
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_forward_mode_derivative_is_refused(which):
    hidden, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9)

    def loss(x):
        h, w, b = (x if i == which else y for i, y in enumerate((hidden, weight, bias)))
        return mk.fused_linear_divergence(h, w, hidden, 2 * weight, student_bias=b)

    x = (hidden, weight, bias)[which]
    with pytest.raises(ValueError, match="fused_linear_divergence: expected no forward-mode"):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))


def test_autocast_takes_what_a_linear_layer_takes():
    student, teacher = heads(dtype=torch.float32)
    low = [[x.bfloat16() for x in side] for side in (student, teacher)]
    expected_loss, expected = fused(*low)
    expected_loss.backward()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, leaves = fused(student, [teacher[0].bfloat16(), *teacher[1:]])
        loss.backward()
    assert torch.equal(loss, expected_loss)
    for mine, other in zip(leaves, expected, strict=True):
        assert mine.grad.dtype == torch.float32
        assert torch.equal(mine.grad, other.grad.float())
    exact = heads()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, _ = fused(*exact)
    torch.testing.assert_close(loss, fused(*exact)[0], rtol=0, atol=0)  # which no linear layer casts


def test_gradients_of_several_chunks_go_into_one_product(backend):
    """13 positions by chunks of 2: a block of five chunks, and one of two whose last is short."""
    student, teacher = heads(N=13, dtype=torch.float32, seed=5)
    keep = torch.arange(13, device=DEVICE) % 4 != 0
    found = fused(student, teacher, mask=keep, chunk_size=2, backend=backend)
    assert_same(found, materialised(student, teacher, mask=keep))


@every_kind
def test_gradcheck(kind):
    """Of "none": a reduced loss spends its gradients in the first of the many backward passes."""
    student, teacher = heads(N=3, H=4, H_teacher=5, V=6, V_teacher=6)

    def loss(hidden, weight, bias):
        return mk.fused_linear_divergence(
            hidden, weight, *teacher[:2], student_bias=bias, **options(kind), reduction="none", chunk_size=2
        )

    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in student])


def test_registered():
    student, teacher = heads(N=4, V=9, V_teacher=9)
    leaves = [x.requires_grad_() for x in student]
    shared = ([1.0, 0.0], [1.0, 0.0], "jsd", 0.5, 9, 3, False, "torch")
    mask, tau = torch.tensor([True, False, True, True]), torch.tensor(1.5)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(positions_op, (*leaves, *teacher, mask, tau, *shared), test_utils=tests)
    scale = torch.ones(4, dtype=torch.float64)
    torch.library.opcheck(total_op, (*leaves, *teacher, mask, tau, scale, [True] * 3, *shared), test_utils=tests)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction):
    student, teacher = heads()

    def loss(hidden, weight):
        return mk.fused_linear_divergence(hidden * 2, weight, *teacher[:2], reduction=reduction, chunk_size=3).sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in student[:2]]
        value = call(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_counts(reduction, dtype):
    student, teacher = heads(dtype=dtype)
    student[0][:] = torch.nan
    mask = torch.zeros(7, dtype=torch.bool, device=DEVICE)
    loss, leaves = fused(student, teacher, mask=mask, reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (leaves[0].grad == 0).all()
    assert (leaves[2].grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_empty_batch(dtype):
    student, teacher = heads(N=0, dtype=dtype)
    loss, leaves = fused(student, teacher)
    loss.backward()
    assert loss == 0
    assert (leaves[1].grad == 0).all()


def test_check_finite():
    student, teacher = heads()
    teacher[0][5, 0] = torch.inf
    with pytest.raises(ValueError, match="1 of 3 positions with NaN or inf, the first 5"):
        fused(student, teacher, check_finite=True, chunk_size=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_weight": torch.ones(9, 5)}, r"student_weight: expected .*\(V, 4\).*got torch.float32 .*\(9, 5\)"),
        ({"student_weight": torch.ones(9, 4).double()}, r"student_weight: expected torch.float32.*got torch.float64"),
        ({"teacher_hidden": torch.ones(2, 4)}, r"teacher_hidden: expected .*\(3, 'H'\), on cpu, got \(2, 4\)"),
        ({"student_bias": torch.ones(4)}, r"student_bias: expected torch.float32 of shape \(9,\) on cpu, got .*\(4,\)"),
        ({"student_softcap": 0.0}, r"student_softcap: expected a finite number from 1e-30 to 1e\+30, got 0.0"),
        ({"teacher_softcap": torch.tensor(3.0)}, r"teacher_softcap: expected a finite number, got tensor\(3"),
        ({"student_logit_scale": torch.nan}, "student_logit_scale: expected a finite number, got nan"),
        ({"teacher_logit_scale": torch.nn.Parameter(torch.ones(()))}, "teacher_logit_scale: expected a finite number"),
        ({"chunk_size": 0}, "chunk_size: expected an integer >= 1, got 0"),
        ({"weights": torch.ones(3, requires_grad=True)}, "weights: expected a tensor without gradient"),
        ({"num_items": torch.tensor(2.0, requires_grad=True)}, "num_items: expected a tensor without gradient"),
        ({"mask": torch.ones(3)}, r"mask: expected bool of shape \(3,\)"),
        ({"reduction": "none", "num_items": 3}, 'num_items: expected None with reduction "none"'),
        ({"student_hidden": torch.ones(1, 3, 1, 4)}, r"student_hidden: expected shape .* got \(1, 3, 1, 4\)"),
        ({"teacher_hidden": torch.ones(3, 4).long()}, "teacher_hidden: expected float32, .* got torch.int64"),
        ({"student_weight": torch.ones(0, 4)}, r"student_weight: expected .*\(V, 4\).*got torch.float32 .*\(0, 4\)"),
        ({"student_weight": torch.ones(9, 4, device="meta")}, "student_weight: expected .* on cpu.* on meta"),
        ({"teacher_bias": torch.ones(9, device="meta")}, "teacher_bias: expected .* on cpu, got .* on meta"),
        ({"teacher_bias": torch.ones(9).double()}, r"teacher_bias: expected torch.float32 .*got torch.float64"),
        ({"divergence": "mse"}, "divergence: expected one of"),
        (
            {"teacher_hidden": torch.ones(3, 4, requires_grad=True)},
            "teacher_hidden: expected a tensor without gradient",
        ),
    ],
)
def test_bad_input(change, message):
    given = {"student_hidden": torch.ones(3, 4), "student_weight": torch.ones(9, 4)}
    given |= {"teacher_hidden": torch.ones(3, 4), "teacher_weight": torch.ones(9, 4)} | change
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    tensors = [given.pop(name) for name in names]
    with pytest.raises(ValueError, match=message):
        mk.fused_linear_divergence(*tensors, **given)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_one_chunk_at_a_time(monkeypatch, reduction):
    """Of both sides: those of a chunk are gone before the next ones are made."""
    made, alive = [], []
    logits = Head.logits

    def watched(head, part):
        alive.append(sum(each() is not None for each in made))
        x = logits(head, part)
        made.append(weakref.ref(x))
        return x

    monkeypatch.setattr(Head, "logits", watched)
    loss, _ = fused(*heads(N=12), divergence="jsd", chunk_size=4, reduction=reduction, backend="torch")
    loss.sum().backward()
    assert len(made) == (6 if reduction == "mean" else 12)
    assert alive == [0, 1] * (len(made) // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [0, 7, 23])  # no block, one, and three, of which the first writes the weight's gradient
def test_gradients_do_not_depend_on_what_memory_held(monkeypatch, N, dtype):
    def gradients():
        loss, leaves = fused(*heads(N=N, dtype=dtype), chunk_size=2, backend="torch")
        loss.backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients()
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(torch.nan))
    for found, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(found, wanted)
        assert found.isfinite().all()
        assert N or not found.any()

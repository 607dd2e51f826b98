"""`fused_linear_divergence` against `divergence_loss` of materialised logits, and against float64."""

from collections import Counter

import linear_divergence_cases
import pytest
import torch
from divergence_cases import every_kind, options, relative_error
from linear_divergence_cases import DEVICE, assert_same, fused, heads, materialised
from torch.profiler import profile

import motab_kernels as mk
from motab_kernels import linear_head
from motab_kernels.backend import HAS_LIBRARY, implementation
from motab_kernels.linear_divergence import _total
from motab_kernels.linear_head import Head, HeadDivergence

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
backend = linear_divergence_cases.backend


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


def test_gradients_of_several_chunks_go_into_one_product(backend):
    """13 positions by chunks of 2: a block of five chunks, and one of two whose last is short."""
    student, teacher = heads(N=13, dtype=torch.float32, seed=5)
    keep = torch.arange(13, device=DEVICE) % 4 != 0
    found = fused(student, teacher, mask=keep, chunk_size=2, backend=backend)
    assert_same(found, materialised(student, teacher, mask=keep))


def count_of_kernels(chunk_size, softcap=0.0):
    """PyTorch's, by name, of a loss of 12 positions and its gradients; the C++ kernels call none."""
    student, teacher = (Head(torch.randn(12, 4), torch.randn(50, 4), None, 1.0, cap) for cap in (softcap, 0.0))
    kernels = implementation("divergence", "cpu", torch.device("cpu"))
    heads = HeadDivergence(student, teacher, None, None, "forward_kl", 0.0, 50, kernels)
    with profile(acc_events=True) as found:  # else torch 2.11 warns
        _total(heads, torch.ones(12), [True, True, False], chunk_size, False, "")
    return Counter({event.key.removeprefix("aten::"): event.count for event in found.key_averages()})


@pytest.mark.skipif(not HAS_LIBRARY, reason="needs the C++ kernels")
def test_few_kernels_between_two_products():
    """Each costs a GPU a pause: those that can take all positions at once are not a chunk's."""
    four, two = count_of_kernels(3), count_of_kernels(6)
    assert four["mm"] - two["mm"] == 2 * 2  # of two chunks more
    names = ("eq", "where", "sum", "add_", "div", "lift_fresh")
    assert {name: four[name] for name in names} == {name: two[name] for name in names}


@pytest.mark.skipif(not HAS_LIBRARY, reason="needs the C++ kernels")
def test_a_softcap_s_gradient_takes_no_pass_of_its_own():
    """Of the logits, each of which costs as much as the loss's."""
    more = count_of_kernels(12, softcap=3.0) - count_of_kernels(12)
    of_numbers = ("to", "_to_copy", "copy_", "empty_strided")  # the cap as a tensor, of which PyTorch speaks too
    assert {name: more[name] for name in more if name not in of_numbers} == {"div_": 1, "tanh_": 1, "mul_": 1}


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
        (
            {"teacher_weight": torch.ones(0)},
            r"teacher_weight: .* got torch.float32 of shape \(0,\) .* ZeRO-3 .* gather it",
        ),
        ({"student_weight": torch.nn.Linear(4, 9)}, "student_weight: expected a tensor, got Linear"),
        ({"teacher_bias": True}, "teacher_bias: expected a tensor, got bool"),
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

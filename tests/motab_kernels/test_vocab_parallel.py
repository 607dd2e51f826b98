"""The losses with a vocabulary that two ranks share, against the same call with the whole of it.

Two processes, started once, run every call of vocab_parallel_cases and write down what came out; the tests look it up.
"""

import pytest
import torch
from divergence_cases import BACKENDS, every_kind, logits, relative_error
from forks import RANKS, run_ranks
from vocab_parallel_cases import Model, bfloat16_heads, every_call, head_of_trl, of_heads, of_logits, rank_main

import motab_kernels as mk
from motab_kernels import interop

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed here")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    codes, written = run_ranks(folder, rank_main, TRITON_INTERPRET="1", PYTHONWARNINGS="error::FutureWarning")
    assert codes == {"rank_main": [0] * RANKS}, written
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(ranks):
    """What either found with the whole vocabulary."""
    return {call: result for found in ranks for call, result in found["alone"].items()}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def same_bits(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@every_kind
@every_call(of_logits)
def test_logits(ranks, alone, case, kind, backend):
    (loss, gradient), (other_loss, other_gradient) = (found[case, kind, backend] for found in ranks)
    same_bits(loss, other_loss)
    expected_loss, expected_gradient = alone[case, kind, backend]
    close(loss, expected_loss)
    close(torch.cat([gradient, other_gradient], -1), expected_gradient)


@every_kind
@every_call(of_heads)
def test_heads(ranks, alone, case, kind, backend):
    first, second = (found[case, kind, backend] for found in ranks)
    expected = alone[case, kind, backend]
    for whole in (0, 1):  # the loss, and the gradient by the hidden states, summed over the ranks
        same_bits(first[whole], second[whole])
        close(first[whole], expected[whole])
    for sliced in (2, 3):
        close(torch.cat([first[sliced], second[sliced]]), expected[sliced])


@every_kind
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_on_one_rank_is_that_position_s_on_both_and_no_other(ranks, kind, backend):
    for found in ranks:
        loss, gradient = found["odd rows", kind, backend]
        assert loss.isnan().tolist() == [False, False, False, True, False]
        assert gradient[3].isnan().all()
        assert not gradient[[0, 1, 2, 4]].isnan().any()


@every_kind
def test_collectives(ranks, kind):
    """One all-gather, two for the kinds that read the logits twice, and none in the backward pass; those for each of
    three chunks of hidden states, and one all-reduce for the products that they share."""
    gathers = 1 if kind in ("forward_kl", "reverse_kl") else 2
    for found in ranks:
        assert found["collectives"]["options", kind] == (gathers, 0)
        assert found["collectives"]["mean", kind] == (3 * gathers, 1)


def test_slices_of_different_width(ranks):
    student, teacher = logits(3, 140, seed=4)
    leaf = student.requires_grad_()
    loss = mk.divergence_loss(leaf, teacher, divergence="jsd", backend="torch")
    loss.backward()
    results = [found["different_widths"] for found in ranks]
    for found in results:
        close(found[0], loss.detach())
    close(torch.cat([gradient for _, gradient, _ in results], -1), leaf.grad)
    alone = of_heads("none", "jsd", "torch", slice(None), vocab_size=None)
    close(results[1][2][1], alone[1])
    close(torch.cat([heads[2] for _, _, heads in results]), alone[2])


def test_inplace_backward(ranks):
    student, teacher = logits(3, 140, seed=5)
    leaf = student.requires_grad_()
    mk.divergence_loss(leaf, teacher, vocab_size=100, backend="torch").backward()
    for found in ranks:
        same_bits(*found["over_the_logits"])
    close(torch.cat([found["over_the_logits"][1] for found in ranks], -1), leaf.grad)


def test_frozen_head(ranks):
    alone = of_heads("mean", "skew_forward_kl", "torch", slice(None))
    for found in ranks:
        close(found["frozen_head"][1], alone[1])
        assert found["frozen_head"][2:] == (None, None)


def test_without_a_column_no_kernel_runs(ranks):
    for found in ranks:
        sums, terms = found["no_column"]
        lowest = torch.finfo(torch.float32).min
        same_bits(sums, torch.tensor([lowest, 0, 0, lowest, 0, 0])[None, :, None].expand(6, 6, RANKS))
        same_bits(terms, torch.zeros(6, 2, RANKS))


def test_low_precision_is_no_worse_than_eager(ranks):
    """Eager: one rank, the same expression in bfloat16, with the softmax in float32."""
    gradients = {}
    for dtype in (torch.float64, torch.bfloat16):
        hidden, weight, teacher_hidden, teacher_weight = (x.to(dtype) for x in bfloat16_heads())
        leaf = hidden.requires_grad_()
        mk.divergence_loss(leaf @ weight.T, teacher_hidden @ teacher_weight.T, backend="torch").backward()
        gradients[dtype] = leaf.grad
    exact = gradients[torch.float64]
    same_bits(*(found["low_precision"] for found in ranks))
    eager = relative_error(gradients[torch.bfloat16], exact)
    assert relative_error(ranks[0]["low_precision"], exact) < 1.1 * eager + 2e-3


def test_compiles_in_one_graph(ranks):
    for found in ranks:
        torch.testing.assert_close(*found["compiled"])


def test_a_sharded_head_gets_the_mean_gradient(ranks):
    hidden, weight, teacher_hidden, teacher_weight = head_of_trl()
    weight.requires_grad_()
    losses = [
        interop.trl.chunked_divergence_loss(x[None], y[None], weight, teacher_weight, torch.ones(1, 5), 0.5)[0]
        for x, y in zip(hidden, teacher_hidden, strict=True)
    ]
    torch.stack(losses).mean().backward()
    assert weight.grad.norm() > 0.01  # else any gradient would be near enough
    for rank, (loss, gradient) in enumerate(found["sharded_head"] for found in ranks):
        close(loss, losses[rank].detach())
        close(gradient, weight.grad)


def test_an_unsharded_head_gets_the_mean_gradient(ranks):
    hidden, weight, teacher_hidden, teacher_weight = head_of_trl()
    model = Model(weight)
    losses = [
        mk.fused_linear_divergence(model(x), model.head.weight, y, teacher_weight)
        for x, y in zip(hidden, teacher_hidden, strict=True)
    ]
    torch.stack(losses).mean().backward()
    for rank, (loss, *gradients) in enumerate(found["unsharded_head"] for found in ranks):
        close(loss, losses[rank].detach())
        for gradient, x in zip(gradients, model.parameters(), strict=True):
            assert x.grad.norm() > 0.01  # else any gradient would be near enough
            close(gradient, x.grad)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            "sharded weight",
            "student_weight: expected a tensor that this process has whole, got a DTensor of (Shard(dim=0)",
        ),
        (
            "sharded logits",
            "teacher_logits: expected a tensor that this process has whole, got a DTensor of (Shard(dim=0)",
        ),
        ("not a group", "group: expected a torch.distributed.ProcessGroup that this rank belongs to, got 'tp'"),
        ("sides", "group: expected the same slice of the vocabulary of student and teacher, got 70 and 60 columns"),
        ("heads", "group: expected the same slice of the vocabulary of student and teacher, got 9 and 8 columns"),
        ("width", "group: expected the same width on every rank, got [70, 69] by rank"),
        ("vocab_size", "group: expected the same vocab_size on every rank, got [80, 81] by rank"),
        ("chunk_size", "group: expected the same chunk_size on every rank, got [4, 5] by rank"),
        ("check_finite", "gradient: expected finite values, got 1 of 3 positions with NaN or inf, the first 1"),
    ],
)
def test_bad_input_is_refused_on_every_rank(ranks, call, expected):
    for found in ranks:
        assert found["messages"][call].startswith(expected)

"""What only a GPU can show: products of 16 bits that return float32, more elements than 32 bits count."""

import pytest
import torch
from attention_cases import assert_matches_definition as assert_attention
from boundary_cases import STATISTICS, assert_equal
from divergence_cases import options, relative_error

import motab_kernels as mk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_linear_in_16_bits(dtype, kind, seed):
    """The products of 16-bit heads return float32, which only a GPU's do."""
    generator = torch.Generator().manual_seed(seed)
    N, H, V = 40, 64, 1203

    def random(*shape, scale):
        return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)

    hidden, weight = random(N, H, scale=1).requires_grad_(), random(V, H, scale=0.3).requires_grad_()
    teacher_hidden, teacher_weight = random(N, H, scale=1), random(V, H, scale=0.3)
    loss = mk.fused_linear_divergence(
        hidden, weight, teacher_hidden, teacher_weight, **options(kind), reduction="sum", chunk_size=16
    )
    loss.backward()
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    sides = leaves[0] @ leaves[1].T, teacher_hidden.double() @ teacher_weight.double().T
    exact = mk.divergence_loss(*sides, **options(kind), reduction="sum", backend="torch")
    exact.backward()
    assert abs(loss.item() / exact.item() - 1) < 1e-4
    for x, y in zip((hidden, weight), leaves, strict=True):
        assert x.grad.dtype == dtype
        assert relative_error(x.grad, y.grad) < 5e-3


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_the_gradient_may_take_the_place_of_the_logits(kind):
    student, teacher = (torch.randn(2, 3, 301, device=DEVICE) for _ in range(2))
    gradients = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        head = leaf * 1
        mk.divergence_loss(head, teacher, **options(kind), inplace_backward=inplace).backward()
        assert torch.equal(head.detach(), leaf.grad if inplace else student)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def free_memory():
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def random_logits(rows, V):
    return torch.empty(rows, V, dtype=torch.bfloat16, device=DEVICE).normal_(std=3)


@pytest.mark.skipif(free_memory() < 20 << 30, reason="needs 20 GiB")
def test_more_elements_than_32_bits_count():
    """The last rows of 2^31 elements and more are those rows alone, bit for bit."""
    V = 151936
    rows = 2**31 // V + 65
    student, teacher = random_logits(rows, V), random_logits(rows, V)
    tokens = torch.randint(V, (rows,), device=DEVICE)
    last = slice(rows - 3, rows)
    parts = student[last].clone(), teacher[last].clone(), tokens[last]
    whole = mk.fused_kl_boundary(student, teacher, tokens)
    assert_equal(mk.fused_kl_boundary(*parts), mk.BoundaryOutput(*(x[last] for x in whole)), STATISTICS)
    # As one row of many tokens too, whose offsets come of the other stride.
    whole = mk.fused_kl_boundary(student[None], teacher[None], tokens[None])
    assert_equal(mk.fused_kl_boundary(*parts), mk.BoundaryOutput(*(x[0, last] for x in whole)), STATISTICS)

    numbers = torch.rand(rows, dtype=torch.float64, device=DEVICE)
    alone = mk.sample_from_logits(parts[0], numbers[last], top_p=0.9).token_ids
    assert torch.equal(mk.sample_from_logits(student, numbers, top_p=0.9).token_ids[last], alone)
    assert torch.equal(mk.sample_from_logits(student[None], numbers[None], top_p=0.9).token_ids[0, last], alone)

    leaf = parts[0].clone().requires_grad_()
    alone = mk.divergence_loss(leaf, parts[1], divergence="jsd", reduction="none")
    alone.sum().backward()
    head = student.requires_grad_() * 1
    losses = mk.divergence_loss(head, teacher, divergence="jsd", reduction="none", inplace_backward=True)
    assert torch.equal(losses[last], alone)
    losses.sum().backward()
    assert torch.equal(head[last], leaf.grad)


@pytest.mark.skipif(free_memory() < 12 << 30, reason="needs 12 GiB")
def test_a_cache_of_more_elements_than_32_bits_count():
    from motab_kernels.gpu import kv_cache as gpu

    B, H, S, D = 2, 8, 2**31 // (2 * 8 * 128) + 64, 128
    storage = torch.randint(-99, 99, (B, H, S, D), dtype=torch.int8, device=DEVICE)
    expected_tail = storage[1, :, S - 70 : S - 20].clone()
    untouched = storage[0, 0, :64].clone()
    gpu.realign_([storage], [0, S - 70], [S, 50], S, clear_padding=False)
    assert torch.equal(storage[1, :, S - 50 :], expected_tail)
    assert torch.equal(storage[0, 0, :64], untouched)


@pytest.mark.skipif(free_memory() < 12 << 30, reason="needs 12 GiB")
@pytest.mark.parametrize("axis", ["slots", "rows"])
def test_attention_over_more_elements_than_32_bits_count(axis):
    """The last slots of a row, or of all rows, are beyond 2^31 elements; a window keeps the rest out."""
    B, H, D = (1, 8, 128) if axis == "slots" else (5, 8, 128)
    S = 2**31 // (H * D) + 600 if axis == "slots" else 2**29 // (H * D) + 600
    storage = torch.empty(B, S, H, D, dtype=torch.bfloat16, device=DEVICE).normal_().transpose(1, 2)
    query = torch.randn(1, H, 1, D, dtype=torch.bfloat16, device=DEVICE)
    lengths, rows = torch.tensor([S - 1], device=DEVICE), torch.tensor([B - 1], device=DEVICE)
    out = mk.ragged_attention(query, storage, storage, lengths, rows=rows, window=100)
    last = storage[B - 1 :, :, S - 100 :].cpu()
    assert_attention(out.cpu(), query.cpu(), last, last, torch.tensor([99]))


@torch.no_grad()
def test_a_row_is_cut_to_a_recurrent_state():
    """The host does not look at lengths on a GPU: a row keeps the most tokens of which there is a state."""
    from tests.recurrent_models import recurrent_model

    model = recurrent_model("qwen3_5_text", dtype=torch.float32, initializer_range=0.3).to(DEVICE)
    cache = mk.RaggedKVCache(model.config, 3, 16, device=DEVICE, dtype=torch.float32)
    ids = torch.randint(3, 61, (3, 9), device=DEVICE)
    for start, end, kept in ((0, 4, [4, 4, 4]), (4, 7, [7, 6, 3])):
        model(ids[:, start:end], **cache.prepare(end - start))
        mk.truncate_kv_cache_(cache, torch.tensor(kept, device=DEVICE))
    assert cache.lengths.tolist() == cache.states.settled_lengths.tolist() == [7, 4, 0]
    logits = model(torch.stack([ids[0, 7:9], ids[1, 4:6], ids[2, :2]]), **cache.prepare(2)).logits
    for row, end in enumerate((9, 6, 2)):
        fresh = model(ids[row : row + 1, :end], use_cache=False).logits[0, -2:]
        torch.testing.assert_close(logits[row], fresh, rtol=1e-3, atol=1e-3)

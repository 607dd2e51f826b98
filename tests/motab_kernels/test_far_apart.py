"""Tensors that reach over more than 2**31 elements by strides below that: a product in 32 bits would wrap around.

As a step's logits of 16 x 4096 positions, or a cache for many long rows. Memory that no op touches is never in use.
"""

import os

import pytest
import torch
from attention_cases import assert_matches_definition as assert_attention
from attention_cases import random_case
from boundary_cases import assert_equal, random_inputs
from divergence_cases import DEVICE, every_kind, logits, options
from sampling_cases import random_case as random_draws

import motab_kernels as mk
from motab_kernels.backend import implementation

APART = (1 << 30) + (1 << 10)


IN_THE_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = [pytest.mark.gpu, pytest.mark.skipif(IN_THE_INTERPRETER, reason="the interpreter copies whole storages")]


@pytest.fixture(params=["torch", *["cpu"] * (DEVICE == "cpu"), pytest.param("triton", marks=COMPILED)])
def backend(request):
    return request.param


def far_apart(x, dim, stride=APART):
    """A copy whose parts along `dim`, three at least, lie so far apart."""
    rest = x.movedim(dim, 0).contiguous()
    assert (len(rest) - 1) * stride >= 1 << 31
    strides = (stride, *rest.stride()[1:])
    storage = torch.empty((len(rest) - 1) * stride + rest[0].numel(), dtype=x.dtype, device=DEVICE)
    view = storage.as_strided(rest.shape, strides)
    view.copy_(rest)
    return view.movedim(0, dim)


@pytest.mark.parametrize("dim", [0, 1])
def test_boundary(backend, dim):
    inputs = [x.to(DEVICE) for x in random_inputs(3, 3, 3000, torch.bfloat16)]
    for i in range(2):
        out = mk.fused_kl_boundary(*(far_apart(x, dim) if j == i else x for j, x in enumerate(inputs)), backend=backend)
        assert_equal(out, mk.fused_kl_boundary(*inputs, backend=backend))


@every_kind
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("inplace", [False, True])
def test_loss(backend, kind, dim, inplace):
    student, teacher = (x.to(DEVICE) for x in logits(3, 3, 3000, dtype=torch.bfloat16))
    found = []
    for i in range(3):
        leaf = (far_apart(student, dim) if i == 1 else student.clone()).requires_grad_()
        other = far_apart(teacher, dim) if i == 2 else teacher
        head = leaf.view_as(leaf) if i == 1 else leaf * 1
        loss = mk.divergence_loss(head, other, **options(kind), inplace_backward=inplace, backend=backend)
        (gradient,) = torch.autograd.grad(loss, head)
        found.append((loss.detach(), gradient.contiguous()))
    assert all(torch.equal(x, y) for each in found[1:] for x, y in zip(each, found[0], strict=True))


def test_sampling(backend):
    draws, uniforms = random_draws(3, 3000, dtype=torch.bfloat16)
    options = {"top_k": 40, "top_p": 0.9, "backend": backend}
    far = mk.sample_from_logits(far_apart(draws, 0), uniforms.to(DEVICE), **options)
    near = mk.sample_from_logits(draws.to(DEVICE), uniforms.to(DEVICE), **options)
    assert torch.equal(far.token_ids, near.token_ids)
    assert far.valid.all()


@pytest.mark.parametrize(
    ("which", "dim"), [("query", 0), ("query", 1), ("query", 2), ("keys", 0), ("keys", 1), ("values", 0)]
)
def test_attention(backend, which, dim):
    query, keys, values, lengths, rows = random_case([60, 7, 40], T=3, H=3, group=3, D=16, dtype=torch.bfloat16)
    given = {"query": query, "keys": keys, "values": values, "lengths": lengths, "rows": rows}
    given = {name: far_apart(x, dim) if name == which else x.to(DEVICE) for name, x in given.items()}
    out = mk.ragged_attention(**given, backend=backend)
    assert_attention(out.cpu(), query, keys, values, lengths, rows=rows)


def test_attention_to_slots_that_lie_far_apart():
    query, keys, values, lengths, rows = (x.to(DEVICE) for x in random_case([60, 7, 40]))
    keys = far_apart(keys, 2, (1 << 31) // 62)
    for backend in ("torch", *["cpu"] * (DEVICE == "cpu")):
        out = mk.ragged_attention(query, keys, values, lengths, rows=rows, backend=backend)
        assert_attention(*(x.cpu() for x in (out, query, keys, values, lengths)), rows=rows.cpu())
    with pytest.raises(
        ValueError, match=r"keys: expected slots less than 33554432 numbers apart, got a stride of 34636833"
    ):
        mk.ragged_attention(query, keys, values, lengths, rows=rows, backend="triton")


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_truncation(backend, dim):
    near = torch.randn(3, 3, 5, 16, generator=torch.Generator().manual_seed(1))
    storages = [far_apart(near, dim), near.to(DEVICE)]
    realign_ = implementation("kv_cache", backend).realign_
    for storage in storages:
        realign_([storage], [1, 0, 3], [3, 4, 2], 4, clear_padding=True)
    assert torch.equal(*storages)

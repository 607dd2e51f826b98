"""`fused_kl_boundary` as an op of torch: compiled, traced, under autograd and other modes, with a caller's buffers."""

import subprocess
import sys

import boundary_cases
import pytest
import torch
from boundary_cases import assert_equal, poisoned_output, random_inputs, with_values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import motab_kernels as mk
from motab_kernels import boundary as boundary_module
from motab_kernels.boundary import fused_kl_boundary_op

backend = boundary_cases.backend


def test_a_state_outlives_inference_mode():
    student, teacher, tokens = random_inputs(2, 3, 50)
    with torch.inference_mode():
        state = mk.EntropyBoundary(0.0).new_state(2)
        mk.fused_kl_boundary(student, teacher, tokens, boundary=mk.EntropyBoundary(0.0), state=state)
    mk.fused_kl_boundary(student, teacher, tokens, boundary=mk.EntropyBoundary(0.0), state=state)
    assert state.tokens.tolist() == [6, 6]
    assert state.reset_().tokens.tolist() == [0, 0]


def test_a_fake_call_leaves_no_fake_constant():
    inputs = random_inputs(1, 1, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        mk.fused_kl_boundary(*inputs, boundary=mk.FixedBoundary(0.123456), temperature=0.654321)
    out = mk.fused_kl_boundary(*inputs, boundary=mk.FixedBoundary(0.123456), temperature=0.654321)
    assert out.threshold.item() == pytest.approx(0.123456)


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


def test_shapes_on_a_meta_device():
    out = mk.fused_kl_boundary(*(x.to("meta") for x in random_inputs(2, 3, 50)), backend="torch")
    assert [x.shape for x in out] == [(2, 3)] * len(out)
    assert out.stray.is_meta


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

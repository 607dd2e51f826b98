"""What `fused_kl_boundary`, its boundaries and its state refuse."""

import math

import boundary_cases
import numpy as np
import pytest
import torch
from boundary_cases import (
    INF,
    NAN,
    poisoned_output,
    random_inputs,
)

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY

backend = boundary_cases.backend
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
        ({"token_ids": [[0] * 3] * 2}, "token_ids: expected a tensor, got list"),
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

"""The Triton kernels of `fused_kl_boundary`: on a GPU, else in Triton's interpreter.

The interpreter takes some 40 ms for a tile and 80 ms for a position, whatever the tile's size. So tests
choose the lanes: few for the many paths of a small vocabulary, many for a large one.
"""

import os
import subprocess
import sys

import pytest
import torch
from boundary_cases import (
    INF,
    NAN,
    STATISTICS,
    assert_equal,
    assert_matches_definition,
    eager,
    poisoned_output,
    random_inputs,
)
from boundary_triton_cases import DEVICE, on_device, poisoned_workspace, triton

import motab_kernels as mk
from motab_kernels.boundary import fused_kl_boundary_op

pytest.importorskip("triton")

from motab_kernels.gpu import boundary as gpu

# NaN, inf and what comes of them are what much of this is about; the interpreter's numpy warns of each.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture
def lanes(monkeypatch):
    """Set the lanes, 16 columns a tile each; a split is two tiles. Afterwards all is as it was."""

    def choose(count):
        settings = gpu.Settings(lanes=count, tiles=2, num_warps=4 if count >= 128 else 1)
        monkeypatch.setattr(gpu, "settings_for", lambda device: settings)

    return choose


# With 8 lanes a tile has 128 columns and a split 256. So V = 1 and 7 have a tail alone, 128 and 256 none,
# 1000 has four splits with a whole tile and a tail in the last. The large sizes are real vocabularies'.
SIZES = [(1, 8), (7, 8), (128, 8), (256, 8), (1000, 8), (32000, 512), (151936, 1024)]


@pytest.mark.parametrize(("V", "count"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics(V, count, dtype, lanes):
    lanes(count)
    inputs = random_inputs(1, 3 if V <= 256 else 1, V, dtype, seed=V)
    assert_matches_definition(triton(*inputs), *inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_not_above_that_of_eager_low_precision(dtype, lanes):
    lanes(512)
    student, teacher, tokens = random_inputs(1, 2, 32000, dtype, noise=0.1)
    out = triton(student, teacher, tokens)
    for name, low in eager(student, teacher, dtype).items():
        exact = eager(student, teacher, torch.float64)[name]
        assert (getattr(out, name) - exact).abs().max() <= (low - exact).abs().max() + 1e-6, name


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-2])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (1e3, 0.0), (0.0, -1e3)])
def test_near_equal_logits_and_constant_shifts(noise, shift, lanes):
    lanes(512)
    student, teacher, tokens = random_inputs(1, 1, 20000, noise=noise)
    student, teacher = student + shift[0], teacher + shift[1]
    assert_matches_definition(triton(student, teacher, tokens), student, teacher, tokens)


@pytest.mark.parametrize("temperature", [0.6, torch.tensor(2.0), torch.tensor([0.5, 3.0]).double()])
def test_temperature(temperature, lanes):
    lanes(8)
    student, teacher, tokens = random_inputs(2, 1, 300)
    out = triton(student, teacher, tokens, temperature=temperature)
    assert_matches_definition(out, student, teacher, tokens, torch.as_tensor(temperature).expand(2))


def test_maxima_that_rise_and_fall(lanes):
    """Each tile's largest logit may be far above or below all before it; ties count for the first."""
    lanes(8)
    student, teacher, tokens = random_inputs(1, 4, 1000)
    ramp = torch.linspace(-200, 200, 1000)
    student[0, 0] += ramp
    teacher[0, 0] += ramp
    student[0, 1] -= ramp
    teacher[0, 2] += ramp.roll(300)
    teacher[0, 3, [999, 700, 648, 520, 521]] = 50.0  # 520 and 648 are a lane's, in two tiles of a split
    out = triton(student, teacher, tokens)
    assert_matches_definition(out, student, teacher, tokens)
    assert out.teacher_argmax[0, 3] == 520


def test_different_vocabularies_strides_and_dtypes(lanes):
    lanes(8)
    student, teacher, tokens = random_inputs(2, 2, 300)
    expected = triton(student, teacher, tokens)
    wide_student = torch.full((2, 2, 400), NAN)
    wide_student[..., 50:350] = student.transpose(0, 1)
    wide_student = on_device(wide_student)[..., 50:350].transpose(0, 1)
    wide_teacher = torch.cat((teacher, torch.full((2, 2, 21), 1e30)), -1)
    assert_equal(triton(wide_student, wide_teacher, tokens), expected)
    spread = on_device(torch.stack((teacher, torch.full_like(teacher, NAN)), -1))[..., 0]
    assert_equal(triton(student, spread, on_device(tokens.t().contiguous()).t()), expected)

    mixed = (student.bfloat16(), teacher, tokens)
    assert_matches_definition(triton(*mixed), *mixed)


def test_excluded_columns(lanes):
    lanes(8)
    student, teacher, tokens = random_inputs(1, 6, 300)
    tokens[:] = 5
    both, student_only, teacher_only, token, most, rises = range(6)
    student[0, both, 10:200] = teacher[0, both, 10:200] = -INF
    student[0, student_only, 10] = -INF
    teacher[0, teacher_only, 10] = -INF
    teacher[0, token, 5] = -INF
    student[0, most, 6:] = teacher[0, most, 6:] = -INF
    student[0, rises, :256] = -INF  # more than a lane's first tile, and the maxima rise by far behind it
    teacher[0, rises, 256:] += 500
    student[0, rises, 256:] += 500
    out = triton(student, teacher, tokens, boundary=mk.FixedBoundary(-1.0))
    assert_matches_definition(
        mk.BoundaryOutput(*(x[:, :5] for x in out)), student[:, :5], teacher[:, :5], tokens[:, :5]
    )
    assert out.forward_kl.isinf().tolist() == [[False, True, False, False, False, False]]
    assert out.reverse_kl.isinf().tolist() == [[False, False, True, True, False, False]]
    assert not any(getattr(out, name).isnan().any() for name in STATISTICS)
    assert not out.stray.any()


@pytest.mark.parametrize("column", [3, 290])  # in a whole tile, in the tail
@pytest.mark.parametrize("boundary", [mk.EntropyBoundary(0.0), mk.FixedBoundary(300, score="teacher_rank")])
def test_nan_strays_at_the_end_of_its_step(column, boundary, lanes):
    lanes(8)
    student, teacher, tokens = random_inputs(6, 2, 300)
    student[0, 0, column] = NAN
    teacher[1, 0, column] = NAN
    student[2, 0, column] = INF
    teacher[3, 0, column] = INF
    teacher[4, 0] = -INF
    step_ends = torch.tensor([False, True]).expand(6, 2)
    state = mk.BoundaryState(6, DEVICE)
    out = triton(student, teacher, tokens, boundary=boundary, state=state, step_ends=step_ends)
    bad = torch.tensor([True, True, True, True, True, False])
    for name in STATISTICS:
        assert torch.equal(getattr(out, name)[:, 0].isnan(), bad), name
        assert not getattr(out, name)[:, 1].isnan().any(), name
    assert (out.teacher_rank[:5, 0] == -1).all()
    assert (out.teacher_argmax[:5, 0] == -1).all()
    assert torch.equal(out.stray[:, 1], bad)
    assert not out.stray[:, 0].any()
    assert state.breach_position.tolist() == [2] * 5 + [-1]


def test_a_row_does_not_depend_on_its_batch(lanes):
    lanes(8)
    student, teacher, tokens = random_inputs(3, 2, 300, torch.bfloat16)
    whole = triton(student, teacher, tokens)
    for b in range(3):
        for i in range(2):
            alone = triton(*(x[b : b + 1, i : i + 1] for x in (student, teacher, tokens)))
            row = mk.BoundaryOutput(*(x[b : b + 1, i : i + 1] for x in whole))
            assert_equal(alone, row, mk.BoundaryOutput._fields[:8])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has one order of adding up")
@pytest.mark.parametrize("V", [200, 2000, 9000])
def test_a_position_does_not_depend_on_its_block(V, lanes):
    """To the last bit, with 1, 8 and 36 splits: they are added up in one order by each kernel that does so."""
    lanes(8)
    student, teacher, tokens = random_inputs(1, 5, V, seed=9)
    together = triton(student, teacher, tokens)
    for first, last in ((0, 1), (1, 5)):
        apart = triton(*(x[:, first:last] for x in (student, teacher, tokens)))
        for name in STATISTICS:
            assert torch.equal(getattr(apart, name), getattr(together, name)[:, first:last]), name


@pytest.mark.skipif(DEVICE == "cpu", reason="out of range on the CPU raises instead")
def test_tokens_outside_the_vocabulary_stray_and_are_not_read():
    student, teacher, tokens = random_inputs(4, 1, 300)
    tokens[:, 0] = torch.tensor([300, -2, 2**62, 5])
    out = triton(student, teacher, tokens, boundary=mk.FixedBoundary(-1.0))
    assert out.teacher_logprob.isnan().flatten().tolist() == [True, True, True, False]
    assert out.stray.flatten().tolist() == [True, True, True, False]


def test_padding_is_not_read():
    """Nor is its part of the workspace, which stays poisoned."""
    student, teacher, tokens = random_inputs(1, 3, 40)
    student[0, 1], teacher[0, 1] = NAN, INF
    tokens[0, 1] = -1
    workspace = poisoned_workspace(1, 3, 40)
    state, expected_state = mk.BoundaryState(1, DEVICE), mk.BoundaryState(1)
    out = triton(student, teacher, tokens, state=state, workspace=workspace)
    expected = mk.fused_kl_boundary(student, teacher, tokens, state=expected_state, backend="torch")
    assert workspace.view(3, -1).isnan().all(1).tolist() == [False, True, False]
    for name, x in zip(out._fields, out, strict=True):
        assert x[0, 1] == (-1 if name in ("teacher_rank", "teacher_argmax") else 0), name
    for i in (0, 2):
        assert out.stray[0, i] == expected.stray[0, i]
    assert torch.equal(state.counters.cpu(), expected_state.counters)


def test_opcheck():
    student, teacher, tokens = map(on_device, random_inputs(1, 1, 40))
    state = mk.BoundaryState(1, DEVICE)
    scale = torch.tensor(0.2, dtype=torch.float64, device=DEVICE)
    buffers = [state.counters, state.scores, state.history], list(on_device(poisoned_output((1, 1))))
    arguments = (student, teacher, tokens, None, None, scale, scale, *buffers, poisoned_workspace(1, 1, 40))
    torch.library.opcheck(fused_kl_boundary_op, (*arguments, "teacher_value", 0, 40, "triton"))


def test_nothing_beside_the_outputs_is_written():
    """Outputs and workspace lie between sentinels."""
    student, teacher, tokens = random_inputs(2, 1, 40)
    dtypes = [x.dtype for x in poisoned_output((2, 1))]
    padded = [torch.full((6, 1), 77, dtype=dtype, device=DEVICE) for dtype in dtypes]
    need = mk.boundary_workspace(2, 1, 40, DEVICE).numel()
    workspace = torch.full((need + 8,), 77.0, device=DEVICE)
    out = mk.BoundaryOutput(*(x[2:4] for x in padded))
    triton(student, teacher, tokens, out=out, workspace=workspace[4:-4])
    for x in padded:
        assert (x[[0, 1, 4, 5]] == torch.tensor(77, dtype=x.dtype, device=DEVICE)).all()
    assert (workspace[[0, 1, 2, 3, -4, -3, -2, -1]] == 77).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty(shape):
    tokens = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    logits = torch.zeros(*shape, 7, device=DEVICE)
    out = mk.fused_kl_boundary(logits, logits, tokens, backend="triton")
    assert all(x.shape == shape for x in out)


def test_two_dimensional_input_is_one_token():
    student, teacher, tokens = map(on_device, random_inputs(2, 1, 40))
    out = mk.fused_kl_boundary(student[:, 0], teacher[:, 0], tokens[:, 0], backend="triton")
    expected = mk.fused_kl_boundary(student, teacher, tokens, backend="triton")
    assert_equal(out, mk.BoundaryOutput(*(x[:, 0] for x in expected)))


def test_bad_input_is_refused():
    student, teacher, tokens = map(on_device, random_inputs(2, 1, 40))
    elsewhere = torch.empty(20, device="meta")
    for workspace in (torch.empty(3), torch.empty(20).double(), torch.empty(20, 2)[:, 0], elsewhere):
        here = workspace if workspace.is_meta else workspace.to(DEVICE)
        with pytest.raises(ValueError, match=r"workspace: expected at least 20 contiguous float32 .*got (3|20) torch"):
            mk.fused_kl_boundary(student, teacher, tokens, workspace=here, backend="triton")
    with pytest.raises(ValueError, match="tokens: expected an integer >= 0, got -1"):
        mk.boundary_workspace(2, -1, 40, DEVICE)
    with pytest.raises(ValueError, match=r'"triton" expected float32, .*float64, torch.float64; use "torch"'):
        mk.fused_kl_boundary(student.double(), teacher.double(), tokens, backend="triton")


def test_the_cpu_needs_the_interpreter():
    code = """
import os, torch
os.environ.pop("TRITON_INTERPRET", None)
import motab_kernels as mk
try:
    mk.fused_kl_boundary(torch.ones(1, 4), torch.ones(1, 4), torch.tensor([0]), backend="triton")
except ValueError as error:
    print(error)
"""
    run = [sys.executable, "-W", "ignore", "-c", code]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert "expected tensors on a GPU, got cpu" in printed
    assert "TRITON_INTERPRET=1" in printed


def test_no_statistic_has_the_wrong_sign_by_rounding():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 8, 2048, generator=generator).to(DEVICE)
    tokens = torch.randint(2048, (1, 8), generator=generator).to(DEVICE)
    teacher.scatter_(2, tokens[..., None], torch.linspace(25, 45, 8, device=DEVICE)[None, :, None])
    out = mk.fused_kl_boundary(teacher, teacher, tokens, backend="triton")
    assert min(x.min() for x in (out.student_entropy, out.teacher_entropy, out.forward_kl, out.reverse_kl)) >= 0
    assert max(out.student_logprob.max(), out.teacher_logprob.max()) <= 0


def test_a_tensor_that_is_negated_when_it_is_read():
    student, teacher, tokens = (x.to(DEVICE) for x in random_inputs(2, 3, 50))
    expected = mk.fused_kl_boundary(-student, -teacher, tokens, backend="triton")
    found = mk.fused_kl_boundary(torch._neg_view(student), torch._neg_view(teacher), tokens, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

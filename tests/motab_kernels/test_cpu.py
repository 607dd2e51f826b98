"""What is particular to the C++ kernels: instruction sets, the exponential, threads, forks, a missing library."""

import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch
from boundary_cases import assert_equal, assert_matches_definition, random_inputs

import motab_kernels as mk
from motab_kernels.backend import HAS_LIBRARY

needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="needs the C++ kernels")


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "avx2", "avx512"])
def library(request):
    """The kernels, held to an instruction set."""
    from motab_kernels.cpu.library import kernels

    if kernels().motab_limit_level(request.param) != request.param:
        kernels().motab_limit_level(2)
        pytest.skip("this machine lacks the instructions")
    yield kernels()
    kernels().motab_limit_level(2)


def exp_of(library, x):
    y = torch.full_like(x, math.nan)
    library.motab_exp(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    return y


@needs_library
def test_exp_over_its_whole_range(library):
    """Every 101st float32 from -87.68 to 88, of both signs down to 2^-25."""
    for first, last in ((0x33000000, 0x42B00000), (0xB3000000 - 2**32, 0xC2AF5C00 - 2**32)):
        x = torch.arange(first, last, 101, dtype=torch.int32).view(torch.float32)
        x = x[: len(x) // 16 * 16].clone()
        assert (exp_of(library, x) / x.double().exp() - 1).abs().max() < 2e-7
    ends = torch.tensor([0.0, -0.0, -88.0, -1e30, -math.inf, math.nan] + [0.0] * 10)
    assert exp_of(library, ends)[:5].tolist() == [1, 1, 0, 0, 0]
    assert exp_of(library, ends)[5].isnan()


@needs_library
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("V", [1, 15, 1024, 4097, 32000])
def test_statistics_of_mixed_dtypes(library, V, dtypes):
    student, teacher, tokens = random_inputs(2, 2, V)
    student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    out = mk.fused_kl_boundary(student, teacher, tokens, backend="cpu")
    assert_matches_definition(out, student, teacher, tokens)


@needs_library
def test_every_float16(library):
    """Subnormals too: each half as the token's logit against one at 0."""
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)[::7]
    student = torch.stack((-halves, torch.zeros_like(halves)), -1)
    tokens = torch.zeros(len(halves), dtype=torch.int64)
    out = mk.fused_kl_boundary(student, student, tokens, backend="cpu")
    expected = student.double().log_softmax(-1)[:, 0]
    torch.testing.assert_close(out.student_logprob.double(), expected, rtol=1e-6, atol=1e-6)


@needs_library
def test_maxima_that_rise_and_fall(library):
    """By more and by less than what a block may lie above those before it."""
    student, teacher, tokens = random_inputs(1, 4, 10000)
    ramp = torch.linspace(-200, 200, 10000)
    student[0, 0] += ramp
    teacher[0, 0] += ramp
    student[0, 1] -= ramp
    teacher[0, 2] += ramp.roll(3000)
    teacher[0, 3, [9999, 7000, 5120, 5121]] = 50.0
    out = mk.fused_kl_boundary(student, teacher, tokens, backend="cpu")
    assert_matches_definition(out, student, teacher, tokens)
    assert out.teacher_argmax[0, 3] == 5120


@needs_library
def test_threads_change_nothing():
    inputs = random_inputs(3, 2, 50000)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(mk.fused_kl_boundary(*inputs, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert_equal(outs[1], outs[0])
    assert_equal(outs[2], outs[0])


@needs_library
def test_a_forked_child_runs_alone():
    """The threads of its parent are not there: to wait for them would be to wait for ever."""
    code = """
import os, signal, torch, motab_kernels as mk
torch.set_num_threads(2)
logits, tokens = torch.randn(2, 200000), torch.tensor([1, 2])
call = lambda: mk.fused_kl_boundary(logits, logits, tokens, backend="cpu").student_entropy
expected = call()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(call(), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
class Items(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): return call()
for batch in torch.utils.data.DataLoader(Items(), num_workers=1, timeout=20, multiprocessing_context="fork"):
    assert torch.equal(batch[0], expected)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment, timeout=120)


def test_a_missing_library_warns_once_and_is_named():
    code = """
import ctypes, warnings, torch
def missing(path): raise OSError
ctypes.CDLL, whole = missing, ctypes.CDLL
import motab_kernels.cpu.library
ctypes.CDLL = whole
import motab_kernels as mk
x = torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert mk.fused_kl_boundary(*x).forward_kl.item() == 0
print(*(f"{w.filename} {w.message}" for w in caught), sep="\\n")
try:
    mk.fused_kl_boundary(*x, backend="cpu")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    warning, refusal = run.stdout.splitlines()
    assert "<string>" in warning
    assert "install a C++ compiler" in warning
    assert "which are not built: install a C++ compiler" in refusal

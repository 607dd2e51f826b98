"""What is particular to the C++ kernels: instruction sets, the exponential, threads, forks, a missing library."""

import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch
from attention_cases import expected as expected_attention
from attention_cases import random_case
from boundary_cases import assert_equal, assert_matches_definition, random_inputs
from divergence_cases import every_kind, expected, logits, options
from sampling_cases import SETTINGS, random_settings
from sampling_cases import assert_matches_definition as assert_samples
from sampling_cases import random_case as random_draws

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


def apply(function, x):
    y = torch.full_like(x, math.nan)
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    return y


def every_101st(first, last):
    """float32 between two bit patterns, as many as whole vectors hold."""
    x = torch.arange(first, last, 101, dtype=torch.int32).view(torch.float32)
    return x[: len(x) // 16 * 16].clone()


@needs_library
def test_exp_over_its_whole_range(library):
    """Every 101st float32 from -87.68 to 88, of both signs down to 2^-25."""
    for first, last in ((0x33000000, 0x42B00000), (0xB3000000 - 2**32, 0xC2AF5C00 - 2**32)):
        x = every_101st(first, last)
        assert (apply(library.motab_exp, x) / x.double().exp() - 1).abs().max() < 2e-7
    ends = torch.tensor([0.0, -0.0, -88.0, -1e30, -math.inf, math.nan] + [0.0] * 10)
    assert apply(library.motab_exp, ends)[:5].tolist() == [1, 1, 0, 0, 0]
    assert apply(library.motab_exp, ends)[5].isnan()


@needs_library
def test_what_an_exponential_and_a_logarithm_lack(library):
    """1 - e^x from -87.68 to -2^-60, and log(1 - x) from 2^-60 to the last float below 1, relative."""
    x = every_101st(0x21800000 - 2**31, 0xC2AF5C00 - 2**32)
    assert (apply(library.motab_one_less_exp, x) / -x.double().expm1() - 1).abs().max() < 2e-7
    x = every_101st(0x21800000, 0x3F800000)
    assert (apply(library.motab_log, x) / (-x.double()).log1p() - 1).abs().max() < 3e-7
    ends = torch.tensor([0.0, math.nan, -math.nan] + [0.0] * 13)
    for function in (library.motab_one_less_exp, library.motab_log):
        assert apply(function, ends)[0] == 0
        assert apply(function, ends)[1:3].isnan().all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(library, dtype):
    """Of few and of many queries, with whole vectors and without."""
    for T, D, given in ((1, 64, {}), (30, 24, {"window": 90, "softcap": 3.0, "sinks": torch.randn(6)})):
        *tensors, lengths, rows = random_case([0, 150, 64], T=T, group=3, D=D, dtype=dtype)
        out = mk.ragged_attention(*tensors, lengths, rows=rows, **given, backend="cpu")
        exact = expected_attention(*tensors, lengths, rows, **given)
        assert (out.double() - exact).abs().max() < (2e-6 if dtype == torch.float32 else 1e-2)


@needs_library
@pytest.mark.parametrize("name", SETTINGS)
def test_sampling(library, name, seed):
    """Of rows with whole pieces of 1024 columns and without."""
    for V in (5000, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            case = random_draws(20, V, dtype=dtype, seed=seed)
            assert_samples(mk.sample_from_logits(*case, **SETTINGS[name], backend="cpu"), *case, **SETTINGS[name])


@needs_library
def test_sampling_by_settings_of_rows(library, seed):
    for V in (5000, 4096):
        case, settings = random_draws(20, V, seed=seed), random_settings(20, seed)
        assert_samples(mk.sample_from_logits(*case, **settings, backend="cpu"), *case, **settings)


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_the_nearest(library, dtype):
    """p = (1, 0) and q = (1/2, 1/2): the gradient is half of what comes from upstream, whatever its size."""
    halves = torch.arange(1, 0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int16)[::3].view(dtype).float()
    upstream = torch.cat((halves, halves * (1 + 2**-11), halves * (1 + 2**-9), torch.tensor([1e-9, 65519.0, 65520.0])))
    student = torch.zeros(len(upstream), 2, dtype=dtype, requires_grad=True)
    teacher = torch.tensor([0.0, -math.inf], dtype=dtype).expand(len(upstream), 2)
    mk.divergence_loss(student, teacher, reduction="none", backend="cpu").backward(upstream)
    assert torch.equal(student.grad[:, 1], (upstream / 2).to(dtype))
    assert torch.equal(student.grad[:, 0], -(upstream / 2).to(dtype))


@needs_library
@every_kind
def test_a_loss_on_each_instruction_set(library, kind):
    """Whole vectors, a tail, several splits, mixed types, maxima that rise by more than a block may."""
    student, teacher = logits(2, 9000, seed=1, dtype=torch.float16)
    student, teacher = (student.float() + torch.linspace(-70, 70, 9000)).requires_grad_(), teacher.roll(4500, -1)
    loss = mk.divergence_loss(student, teacher, **options(kind), reduction="none", backend="cpu")
    loss.sum().backward()
    expected_loss, expected_gradient = expected(student, teacher, kind)
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=3e-6, atol=1e-6)
    # Of a loss of 100 nats, of which float32 keeps 4e-6.
    torch.testing.assert_close(student.grad.double(), expected_gradient, rtol=1e-5, atol=2e-6)


@needs_library
def test_a_gradient_written_over_its_logits_is_the_same():
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits(3, 5000, dtype=dtype)
        gradients = []
        for inplace in (False, True):
            leaf = student.clone().requires_grad_()
            memory = leaf * 1
            mk.divergence_loss(memory, teacher, divergence="jsd", inplace_backward=inplace, backend="cpu").backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


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
@pytest.mark.parametrize("V", [4096, 32000])
def test_sums_keep_their_digits(library, V):
    """One column far above the others, in the first block or after it; many equal ones."""
    student, teacher, tokens = random_inputs(2, 20, V, scale=0.3, noise=0.3)
    student[0, 10:] = teacher[0, 10:] = 0.0
    height = torch.arange(7, 17.0).repeat(2)
    for row, column in enumerate((1500, 0)):
        teacher[row, :, column], student[row, :, column] = height, height - 2
    student[0, 10:, 1::2] = 1.9
    out = mk.fused_kl_boundary(student, teacher, tokens, backend="cpu")
    assert_matches_definition(out, student, teacher, tokens, atol=4e-6)


@needs_library
def test_threads_change_nothing():
    inputs = random_inputs(3, 2, 50000)
    before = torch.get_num_threads()
    try:
        outs, gradients, tokens = [], [], []
        case = random_draws(9, 50000)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(mk.fused_kl_boundary(*inputs, backend="cpu"))
            leaf = inputs[0].clone().requires_grad_()
            mk.divergence_loss(leaf, inputs[1], divergence="jsd", backend="cpu").backward()
            gradients.append(leaf.grad)
            tokens.append(mk.sample_from_logits(*case, top_p=0.9, backend="cpu").token_ids)
    finally:
        torch.set_num_threads(before)
    assert_equal(outs[1], outs[0])
    assert_equal(outs[2], outs[0])
    assert torch.equal(gradients[1], gradients[0])
    assert torch.equal(gradients[2], gradients[0])
    assert torch.equal(tokens[1], tokens[0])
    assert torch.equal(tokens[2], tokens[0])


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

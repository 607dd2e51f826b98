"""The logarithm of a mixture, on which the kinds with a mixture rest; and mixtures that lean as far as they can."""

import math
import os

import pytest
import torch
from divergence_cases import DEVICE, logits, relative_error

import motab_kernels as mk

pytest.importorskip("triton")

import triton
import triton.language as tl

from motab_kernels.gpu.divergence import NVIDIA
from motab_kernels.gpu.divergence_terms import _minus_log2

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@triton.jit
def minus_log2_kernel(x_ptr, u_ptr, out_ptr, FAST: tl.constexpr):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out_ptr + i, _minus_log2(tl.load(x_ptr + i), tl.load(u_ptr + i), FAST))


def test_minus_log2():
    """Near 0 to 2e-7 of itself, from 1e-30 on, and 0 at 0; elsewhere of what u is, also of the least u. The interpreter
    rounds each multiply-add twice."""
    x = torch.cat((torch.logspace(-30, -1e-3, 1 << 13, dtype=torch.float64).float(), torch.arange(1 << 13) / (1 << 13)))
    x[:4] = torch.tensor([0.0, 1 - 2**-24, 0.0625, 0.5])
    u = (1 - x.double()).float()
    out = torch.empty_like(x, device=DEVICE)
    minus_log2_kernel[(x.numel() // 1024,)](x.to(DEVICE), u.to(DEVICE), out, NVIDIA)
    near = x < 0.0625
    exact = torch.where(near, -torch.log1p(-x.double()), -u.double().log()) / math.log(2)
    error = (out.cpu().double() - exact).abs() / exact.clamp_min(1e-30)
    assert error[near].max() < (6e-7 if "TRITON_INTERPRET" in os.environ else 2e-7)
    assert error[~near].max() < 3e-6


@pytest.mark.parametrize("lam", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("noise", [0.003, 1.0, 10.0])
def test_any_mixture(divergence, lam, noise):
    student, teacher = logits(2, 300, seed=1, noise=noise)
    keywords = {"divergence": divergence, "beta": lam, "alpha": lam, "reduction": "none"}
    found = []
    for x, backend in ((student.to(DEVICE), "triton"), (student.double(), "torch")):
        leaf = x.requires_grad_()
        loss = mk.divergence_loss(leaf, teacher.to(leaf.device, leaf.dtype), **keywords, backend=backend)
        loss.sum().backward()
        found.append((loss.detach().cpu().double(), leaf.grad.cpu()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=3e-6, atol=1e-6)
    assert relative_error(found[0][1], found[1][1]) < (1e-5 if noise == 1 else 2e-3)

"""The logarithm of a mixture, on which the kinds with a mixture rest; and mixtures that lean as far as they can."""

import pytest
import torch
from divergence_cases import logits, relative_error

import motab_kernels as mk

pytest.importorskip("triton")

import triton
import triton.language as tl

from motab_kernels.gpu.divergence_terms import _minus_log2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@triton.jit
def minus_log2_kernel(x_ptr, out_ptr, EVEN: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, _minus_log2(tl.load(x_ptr + i), EVEN))


@pytest.mark.parametrize("even", [True, False])
def test_minus_log2(even):
    """To 2e-7 of itself from 1e-30 on, and 0 at 0, and next to 1; the interpreter rounds each multiply-add twice."""
    N = 1 << 16
    spread = torch.logspace(-30, -0.31, N // 2, dtype=torch.float64).float()
    even_spread = torch.linspace(0, 0.5 if even else 1, N // 2 + 1)[: N // 2]
    x = torch.cat((spread, even_spread))
    x[-4:] = torch.tensor([0.0, 0.5, 0.25, 0.5]) if even else torch.tensor([0.0, 1 - 2**-24, 1 - 2**-10, 0.5])
    out = torch.empty(N, device=DEVICE)
    minus_log2_kernel[(1,)](x.to(DEVICE), out, even, N)
    exact = -torch.log1p(-x.double()) / torch.log(torch.tensor(2.0).double())
    error = (out.cpu().double() - exact).abs()
    assert (error <= (2e-7 if DEVICE == "cuda" else 6e-7) * exact).all(), (error / exact).nan_to_num().max()


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

"""`fused_kl_boundary` by its Triton kernels with poisoned buffers: on a GPU, else in Triton's interpreter."""

import torch
from boundary_cases import NAN, poisoned_output

import motab_kernels as mk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def poisoned_workspace(B, T, V):
    return mk.boundary_workspace(B, T, V, DEVICE).fill_(NAN)


def on_device(x):
    """Tensors, and states and boundaries that hold some, on the device under test."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, mk.BoundaryOutput):
        return mk.BoundaryOutput(*map(on_device, x))
    if isinstance(x, mk.EntropyBoundary):
        return mk.EntropyBoundary(on_device(x.epsilon0), on_device(x.theta), x.entropy_top_k)
    return x


def on_host(x):
    return mk.BoundaryOutput(*(y.cpu() for y in x))


def triton(*inputs, **options):
    """The op on the device under test with poisoned buffers; the outputs on the host."""
    B, T = inputs[2].shape
    V = min(x.shape[-1] for x in inputs[:2])
    options = {name: on_device(option) for name, option in options.items()}
    options.setdefault("out", on_device(poisoned_output((B, T))))
    options.setdefault("workspace", poisoned_workspace(B, T, V))
    return on_host(mk.fused_kl_boundary(*map(on_device, inputs), **options, backend="triton"))

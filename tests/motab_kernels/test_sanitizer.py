"""The sanitizer that every test of a Triton kernel in the interpreter runs under finds what a lost mask does."""

import inspect
import os
import re
import sys
import types

import numpy as np
import pytest
import torch
from attention_cases import random_case
from sanitizer import Sanitizer

import motab_kernels as mk

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.errors import InterpreterError

from motab_kernels.gpu import attention, boundary, divergence, kv_cache, sampling

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
TAIL = ("inside = whole + columns < end", "inside = whole + columns >= 0")
KINDS = ("forward_kl", "jsd")


def padded(*shape):
    """Rows apart from each other, of an odd size; the memory ends with the last one."""
    *leading, V = shape
    return torch.randn(*leading, V + 3)[..., 3:]


def run_boundary():
    """Splits that are combined by the kernel that decides, and in a launch of their own."""
    chosen = mk.MovingAverageBoundary(2.0, 3)
    for T in (3, 33):
        tokens = torch.tensor([[0, 76, -1], [5, 6, 7]]).repeat(1, T // 3)
        keywords = {"boundary": chosen, "step_ends": tokens % 2 == 0, "temperature": torch.tensor([0.5, 2.0])}
        mk.fused_kl_boundary(padded(2, T, 77), padded(2, T, 77), tokens, **keywords, backend="triton")


def run_losses():
    for kind in KINDS:
        student = padded(2, 3, 77).requires_grad_()
        mask = torch.tensor([[True, False, True]] * 2)
        keywords = {"mask": mask, "temperature": torch.tensor([0.5, 2.0]), "backend": "triton"}
        mk.divergence_loss(student, padded(2, 3, 77), divergence=kind, **keywords).backward()


def run_cache():
    kv_cache.realign_([padded(3, 1, 40, 5), padded(3, 2, 40, 5)], [0, 3, 31], [20, 25, 9], 25, clear_padding=True)


def run_attention():
    """The rows end where their memory ends: those of the cache with the slots, the heads in the middle of a tile."""
    for T in (1, 17):
        query, keys, values, lengths, rows = random_case([3, 40], T, H=1, group=3, D=5, spare=0)
        sinks = torch.zeros(3)
        mk.ragged_attention(query, keys, values, lengths, rows=rows, sinks=sinks, backend="triton")


def run_sampling():
    """The rows end in the middle of a tile."""
    numbers = torch.tensor([[0.0, 0.5, 0.9]] * 2, dtype=torch.float64)
    mk.sample_from_logits(padded(2, 3, 77), numbers, top_k=9, top_p=0.9, backend="triton")


# Each kernel with the masks that are taken from it.
KERNELS = [
    (boundary, "partial_kernel", run_boundary, *TAIL),
    (boundary, "combine_kernel", run_boundary, "(split < S)", "(split >= 0)"),
    (boundary, "decide_kernel", run_boundary, "inside = i < T", "inside = i >= 0"),
    (divergence, "sums_kernel", run_losses, *TAIL),
    (divergence, "finish_kernel", run_losses, "inside = position < R", "inside = position >= 0"),
    (divergence, "terms_kernel", run_losses, *TAIL),
    (divergence, "gradient_kernel", run_losses, *TAIL),
    (kv_cache, "_realign_kernel", run_cache, "(word < head_size)", "(word >= 0)"),
    (attention, "split_kernel", run_attention, "(slot[:, None] < end) & ", ""),
    (attention, "combine_kernel", run_attention, "there = split < end", "there = split >= 0"),
    (sampling, "sample_kernel", run_sampling, "mask=start + columns < V", "mask=start + columns >= 0"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Of 32 columns, one a split: three splits, of which the last has a tail alone."""
    monkeypatch.setattr(boundary, "settings_for", lambda device: boundary.Settings(lanes=2, tiles=1))
    monkeypatch.setattr(divergence, "settings_for", lambda device: divergence.Settings(lanes=2, tiles=1, rows=4))
    small = attention.Settings(split=32, slots_per_query=1, queries=16, slots=16, split_tokens=16, splits=4)
    monkeypatch.setattr(attention, "settings_for", lambda device: small)
    monkeypatch.setattr(sampling, "settings_for", lambda device: sampling.Settings(lanes=8))


@pytest.mark.parametrize("run", [run_boundary, run_losses, run_cache, run_attention, run_sampling])
def test_kernels_stay_within_their_tensors(run):
    run()


@pytest.mark.parametrize(("launcher", "name", "run", "mask", "lost"), KERNELS)
def test_a_lost_mask_is_found(launcher, name, run, mask, lost, monkeypatch, tmp_path):
    kernel = getattr(launcher, name)
    home = sys.modules[kernel.fn.__module__]
    source = inspect.getsource(home)
    assert mask in source
    path = tmp_path / "planted.py"  # Triton reads a kernel's source from its file
    path.write_text(source.replace(mask, lost))
    planted = types.ModuleType("planted")
    planted.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "planted", planted)
    exec(compile(path.read_text(), path, "exec"), planted.__dict__)
    monkeypatch.setattr(launcher, name, getattr(planted, name))
    with pytest.raises(InterpreterError, match="elements outside of the kernel"):
        run()


def test_all_kernels_are_tested():
    """Each that a launcher starts: `launch(name, ...)`."""
    started = {
        (module, match)
        for module in (attention, boundary, divergence, kv_cache, sampling)
        for match in re.findall(r"launch\((\w+),", inspect.getsource(module))
    }
    assert started == {(launcher, name) for launcher, name, *_ in KERNELS}


def test_the_gap_between_rows_is_outside():
    """And a row's first element; every other of the same memory; an element that only begins inside."""
    storage = torch.zeros(2, 8)
    sanitizer = Sanitizer()
    sanitizer.allow(storage[:, 2:7])

    def load(element, type_=tl.float32):
        address = np.array([storage.data_ptr() + 4 * element])
        handle = types.SimpleNamespace(data=address, get_element_ty=lambda: type_)
        sanitizer.check("load", handle, types.SimpleNamespace(data=np.array([True])))

    for element in (2, 6, 10, 14):
        load(element)
    for element in (0, 7, 9, 15, 16, -1):
        with pytest.raises(IndexError, match="load of 1 elements outside"):
            load(element)
    with pytest.raises(IndexError, match="outside"):
        load(6, tl.int64)

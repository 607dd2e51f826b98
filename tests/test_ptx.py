"""The machine that runs compiled kernels (`ptx`): it computes what a GPU does, and stops at what a GPU lets pass."""

import inspect
import os
import types

import numpy as np
import pytest
import torch
from ptx.machine import Machine
from ptx.memory import GlobalMemory, GpuError
from ptx.text import read

pytest.importorskip("triton")

import triton
import triton.language as tl

needs_machine = pytest.mark.skipif("MOTAB_PTX" not in os.environ, reason="needs MOTAB_PTX=80")


def run(code, threads=32, shared=64, **tensors):
    """PTX of one program, which finds the addresses of tensors in parameters of their names."""
    registers = "".join(f".reg .{kind} {name}<99>;\n" for kind, name in [("pred", "%p"), ("b32", "%r"), ("b64", "%rd")])
    kernel = read(".visible .entry kernel() {\n" + registers + code + "\nret;\n}\n")
    arguments = {name: np.full((1, 1), x.data_ptr(), np.uint64) for name, x in tensors.items()}
    Machine(kernel, GlobalMemory(tensors.values()), arguments, (1, 1, 1), threads, shared).run()


LANE = "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2;"  # and its offset in words
PLACE = LANE + "ld.param.b64 %rd1, [out]; cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2;"


def test_threads_part_ways_and_meet():
    """Each third thread counts to its number in a loop of its own."""
    out = torch.full((64,), -1, dtype=torch.int32)
    run(
        PLACE
        + """mov.u32 %r3, 0; rem.u32 %r4, %r1, 3; setp.ne.b32 %p1, %r4, 0; @%p1 bra $L__end;
        $L__loop:
        setp.ge.s32 %p2, %r3, %r1; @%p2 bra $L__end;
        add.s32 %r3, %r3, 1; bra.uni $L__loop;
        $L__end:
        st.global.b32 [%rd3], %r3;""",
        threads=64,
        out=out,
    )
    assert out.tolist() == [i if i % 3 == 0 else 0 for i in range(64)]


def test_an_address_outside_of_the_tensors():
    """One element too many; the gap between two rows; what no tensor holds."""
    run(PLACE + "st.global.b32 [%rd3], %r1;", out=torch.zeros(32))
    for tensor in (torch.zeros(31), torch.zeros(2, 32)[:, ::2], torch.zeros(40)[:31]):
        with pytest.raises(GpuError, match=r"(1|16) accesses of 4 bytes outside"):
            run(PLACE + "st.global.b32 [%rd3], %r1;", out=tensor)
    with pytest.raises(GpuError, match="outside"):
        run(LANE + "st.shared.b32 [%r2], %r1;", shared=124)


def test_an_address_that_is_not_aligned():
    wide = PLACE + "ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1+16]; st.global.b32 [%rd3], %r3;"
    run(wide, out=torch.zeros(32))
    with pytest.raises(GpuError, match="16 bytes at an address that is not divisible"):
        run(wide.replace("+16", "+8"), out=torch.zeros(32))


def test_a_register_that_is_not_written():
    with pytest.raises(GpuError, match="%r9 is read before it is written"):
        run(PLACE + "add.s32 %r3, %r9, 1; st.global.b32 [%rd3], %r3;", out=torch.zeros(32))


EXCHANGE = """st.shared.b32 [%r2], %r1;
    bar.sync 0;
    xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd3], %r4;"""


def test_a_race_between_warps():
    out = torch.zeros(64, dtype=torch.int32)
    run(PLACE + EXCHANGE, threads=64, shared=256, out=out)
    assert out.tolist() == [i ^ 32 for i in range(64)]
    with pytest.raises(GpuError, match="race in shared memory: two warps touched byte 0 without a barrier"):
        run(PLACE + EXCHANGE.replace("bar.sync 0;", ""), threads=64, shared=256, out=out)
    one = PLACE + "st.global.b32 [%rd1], %r1; add.s64 %rd4, %rd1, 0; st.global.b32 [%rd4], %r2;"
    run(one, out=out)
    with pytest.raises(GpuError, match="two warps touched byte 0"):
        run(one, threads=64, out=out)


COPY = """cp.async.cg.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x10, %r4; cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r5, [%r3+4]; st.global.b32 [%rd3], %r5;"""


def test_a_copy_that_is_not_waited_for():
    start = PLACE + "mov.u32 %r3, 0; mov.u32 %r4, 16;"
    out = torch.arange(32, dtype=torch.int32)
    with pytest.raises(GpuError, match="ended before its copies"):
        run(start + COPY.replace("wait_group 0", "wait_group 1"), out=out)
    assert (out == -1).all()  # what was there when it was read: poison
    out = torch.arange(32, dtype=torch.int32)
    run(start + COPY, out=out)
    assert (out == 1).all()


def test_a_barrier_that_not_all_reach():
    with pytest.raises(GpuError, match="a barrier, or what acts as one, that not all threads"):
        run(LANE + "setp.eq.b32 %p1, %r1, 5; @%p1 bra $L__end;\nbar.sync 0;\n$L__end:", threads=32)


@triton.jit
def convert_kernel(x_ptr, half_ptr, bfloat_ptr, whole_ptr, other_ptr, quotient_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(half_ptr + i, x.to(tl.float16))
    tl.store(bfloat_ptr + i, x.to(tl.bfloat16))
    whole = tl.load(whole_ptr + i)
    tl.store(quotient_ptr + i, whole // tl.load(other_ptr + i))


@needs_machine
def test_conversions_and_division():
    """Of all kinds of bits: subnormals, infinities, NaN."""
    N = 1 << 14
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-(2**31), 2**31, (2, N), generator=generator).int()
    x = whole[0].view(torch.float32).clone()
    x[:5] = torch.tensor([np.inf, -np.inf, np.nan, 65519.99, 3.4e38])
    x[5:999] *= 1e-3
    other = (whole[1] >> torch.arange(N) % 31) | 1
    half, bfloat, quotient = torch.empty(N).half(), torch.empty(N).bfloat16(), torch.empty(N).int()
    convert_kernel[(1,)](x, half, bfloat, whole[0], other, quotient, N)
    torch.testing.assert_close(half, x.half(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(quotient, torch.div(whole[0], other, rounding_mode="trunc"))


@triton.jit
def scan_kernel(x_ptr, sums_ptr, tops_ptr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row, i = tl.arange(0, ROWS), tl.arange(0, SIZE)
    x = tl.load(x_ptr + row[:, None] * SIZE + i[None, :]).to(tl.float32)
    tl.store(sums_ptr + row, tl.cumsum(tl.sum(x.to(tl.float64), axis=1), axis=0))
    tl.store(tops_ptr + row, tl.max(x, axis=1))


@needs_machine
def test_running_sums_and_maxima():
    """Values from lanes further down; bfloat16 compared as such, whose bits would be in another order."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums, tops = torch.empty(256, dtype=torch.float64), torch.empty(256)
    scan_kernel[(1,)](x, sums, tops, 256, 8)
    torch.testing.assert_close(sums, x.double().sum(1).cumsum(0), rtol=0, atol=1e-12)
    assert torch.equal(tops, x.float().amax(1))


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    places = i[:, None] * SIZE + i[None, :]
    a, b = tl.load(a_ptr + places), tl.load(b_ptr + places)
    tl.store(out_ptr + places, tl.dot(a, tl.trans(b)))


@needs_machine
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_products(dtype):
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(64, 64)
    product_kernel[(1,)](a, b, out, 64)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, rtol=0, atol=2e-5)


@needs_machine
def test_a_lost_barrier_is_found(monkeypatch, tmp_path):
    """In the kernel that moves rows onto themselves, which the interpreter and lockstep take for right."""
    from motab_kernels.gpu import kv_cache

    source = inspect.getsource(kv_cache)
    path = tmp_path / "planted.py"  # Triton reads a kernel's source from its file
    path.write_text(source.replace("tl.debug_barrier()", "pass"))
    planted = types.ModuleType("planted")
    planted.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), planted.__dict__)
    storage = torch.zeros(1, 1, 800, 64)
    kv_cache.realign_([storage], [3], [700], 704, clear_padding=False)
    monkeypatch.setattr(kv_cache, "_realign_kernel", planted._realign_kernel)
    with pytest.raises(GpuError, match=r"race in memory of tensor .*: two warps touched byte"):
        kv_cache.realign_([storage], [3], [700], 704, clear_padding=False)


@triton.jit
def everyone_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@needs_machine
def test_a_race_between_programs():
    everyone_kernel[(1,)](torch.zeros(1, dtype=torch.int32))
    with pytest.raises(GpuError, match="two programs touched byte 0"):
        everyone_kernel[(2,)](torch.zeros(1, dtype=torch.int32))

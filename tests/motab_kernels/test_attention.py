"""`ragged_attention` against its definition in float64, read one query at a time."""

import math

import numpy as np
import pytest
import torch
from attention_cases import assert_matches_definition, expected, in_pages, random_case

import motab_kernels as mk
from motab_kernels.attention import ragged_attention_op
from motab_kernels.backend import HAS_LIBRARY

BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(not HAS_LIBRARY, reason="needs the C++ kernels"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [0, 200, 63, 130]  # a tile has 64 slots


def settings(heads, seed=0):
    sinks = 2 * torch.randn(heads, generator=torch.Generator().manual_seed(seed))
    return {
        "plain": {},
        "window": {"window": 70},
        "narrow window": {"window": 1},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": sinks},
        "all": {"window": 100, "softcap": 5.0, "sinks": sinks, "scale": 0.3},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "D"), [(1, 64), (2, 80), (3, 8), (7, 128)])
@pytest.mark.parametrize("T", [1, 5])
def test_matches_the_definition(backend, dtype, group, D, T):
    """Few queries of a head, which take their keys as they lie, and many."""
    *tensors, lengths, rows = random_case(LENGTHS, T=T, group=group, D=D, dtype=dtype, seed=group * T)
    out = mk.ragged_attention(*tensors, lengths, rows=rows, backend=backend)
    assert_matches_definition(out, *tensors, lengths, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", settings(1))
@pytest.mark.parametrize("T", [1, 40])
def test_settings(backend, name, T):
    *tensors, lengths, rows = random_case(LENGTHS, T=T, group=2, dtype=torch.float32, seed=T)
    options = settings(4)[name]
    out = mk.ragged_attention(*tensors, lengths, rows=rows, **options, backend=backend)
    assert_matches_definition(out, *tensors, lengths, rows, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 40])
def test_what_no_token_sees_does_not_matter(backend, T):
    """In front of the window too; what is behind a row is NaN in each case here."""
    *tensors, lengths, rows = random_case(LENGTHS, T=T)
    for row, length in zip(rows.tolist(), LENGTHS, strict=True):
        for x in tensors[1:]:
            x[row, :, : max(0, length + 1 - 70)] = math.nan
    out = mk.ragged_attention(*tensors, lengths, rows=rows, window=70, backend=backend)
    assert_matches_definition(out, *tensors, lengths, rows, window=70)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [64, 192])
@pytest.mark.parametrize("T", [1, 40])
def test_a_row_in_pages(backend, dtype, page_size, T):
    """To the bit as in one piece; pages that no row reaches may have any number, and so may those before a window."""
    case = random_case(LENGTHS, T=T, H=2, group=2, D=24, dtype=dtype, seed=T)
    *paged, table = in_pages(*case, page_size)
    whole = mk.ragged_attention(*case[:4], rows=case[4], backend=backend)
    assert torch.equal(mk.ragged_attention(*paged, page_table=table, backend=backend), whole)
    spread = torch.stack((table, table), 2)[..., 0]
    assert torch.equal(mk.ragged_attention(*paged, page_table=spread, backend=backend), whole)
    table[1, : 138 // page_size] = 1 << 40
    out = mk.ragged_attention(*paged, page_table=table, window=63, backend=backend)
    assert_matches_definition(out, *paged, page_table=table, window=63)
    table[1, : 192 // page_size] = 1 << 40  # a window that begins where a page does
    out = mk.ragged_attention(*paged, page_table=table, window=9, backend=backend)
    assert_matches_definition(out, *paged, page_table=table, window=9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_at_the_ends_of_their_range(backend):
    """Exponentials neither overflow nor vanish; a score of -inf takes no part, one of NaN is the row's own."""
    *tensors, lengths, rows = random_case([100, 100, 100], T=3, dtype=torch.float32)
    query, keys, _ = tensors
    keys[rows[0], :, :, 0] = -math.inf
    query[..., 0] = 0
    query[0, ..., 0] = 1
    keys[rows[0], :, 99, 0] = 0  # the one that counts
    query[1] *= 1e4
    keys[rows[2], :, 50] = math.nan
    keys[rows[1]] *= 1e4
    out = mk.ragged_attention(*tensors, lengths, rows=rows, backend=backend)
    exact = expected(*tensors, lengths, rows)
    torch.testing.assert_close(out[:2].double(), exact[:2], rtol=1e-5, atol=1e-5)
    assert out[2].isnan().all()
    for softcap in (1.0, 50.0):
        tensors[0], tensors[1] = query[1:2], keys
        out = mk.ragged_attention(*tensors, lengths[1:2], rows=rows[1:2], softcap=softcap, backend=backend)
        exact = expected(*tensors, lengths[1:2], rows[1:2], softcap=softcap)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 9])
def test_a_row_does_not_depend_on_its_batch(backend, T):
    """To the bit: alone, in another order, with slots beyond, on one thread."""
    query, keys, values, lengths, rows = random_case(LENGTHS, T=T, group=3, D=40)
    out = mk.ragged_attention(query, keys, values, lengths, rows=rows, backend=backend)
    shorter = (x[:, :, : int(lengths.max()) + T] for x in (keys, values))
    order = torch.tensor([2, 0, 3, 1])
    part = mk.ragged_attention(query[order], *shorter, lengths[order], rows=rows[order], backend=backend)
    assert torch.equal(part, out[order])
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    try:
        for i in range(4):
            alone = mk.ragged_attention(
                query[i : i + 1], keys, values, lengths[i : i + 1], rows=rows[i : i + 1], backend=backend
            )
            assert torch.equal(alone, out[i : i + 1])
            own = keys[rows[i]][None], values[rows[i]][None]
            assert torch.equal(mk.ragged_attention(query[i : i + 1], *own, lengths[i : i + 1], backend=backend), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_beyond_what_they_bound(backend):
    query, keys, values, lengths, rows = random_case([5, 9])
    out = mk.ragged_attention(query, keys, values, lengths, rows=rows, backend=backend)
    seen = mk.ragged_attention(query, keys, values, lengths, rows=rows, window=10**20, backend=backend)
    assert torch.equal(seen, out)
    capped = mk.ragged_attention(query, keys, values, lengths, rows=rows, softcap=1e30, backend=backend)
    torch.testing.assert_close(capped, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_are_negated_when_they_are_read(backend):
    query, keys, values, lengths, rows = random_case([5, 9])
    expected = mk.ragged_attention(-query, -keys, -values, lengths, rows=rows, backend=backend)
    negated = (torch._neg_view(x) for x in (query, keys, values))
    assert torch.equal(mk.ragged_attention(*negated, lengths, rows=rows, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_around_the_end_of_a_tile(backend, T, window):
    """Where a row or its window ends or begins one slot before a tile does, with it, or one after."""
    *tensors, lengths, rows = random_case([*range(60, 67), 126], T=T, seed=T)
    out = mk.ragged_attention(*tensors, lengths, rows=rows, window=window, backend=backend)
    assert_matches_definition(out, *tensors, lengths, rows, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sinks_of_another_dtype_and_stride(backend, dtype):
    *tensors, lengths, rows = random_case([7, 33])
    sinks = torch.tensor([-1.0, 0.5, 3.0, 40.0])
    spread = torch.stack((sinks, torch.full((4,), math.nan)), 1).to(dtype)[:, 0]
    out = mk.ragged_attention(*tensors, lengths, rows=rows, sinks=sinks, backend=backend)
    assert torch.equal(mk.ragged_attention(*tensors, lengths, rows=rows, sinks=spread, backend=backend), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_rows_with_gaps(backend):
    *tensors, lengths, rows = random_case([7, 33])
    out = mk.ragged_attention(*tensors, lengths, rows=rows, backend=backend)
    apart = [torch.stack((x, 0 * x), 1)[:, 0] for x in (lengths, rows)]
    assert torch.equal(mk.ragged_attention(*tensors, apart[0], rows=apart[1], backend=backend), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_that_fills_every_slot(backend):
    *tensors, lengths, rows = random_case([0, 0], T=5, spare=0)
    out = mk.ragged_attention(*tensors, lengths, rows=rows, visible_length=5, backend=backend)
    assert_matches_definition(out, *tensors, lengths, rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_and_no_autocast(backend):
    *tensors, lengths, rows = random_case([5, 9])
    out = mk.ragged_attention(*tensors, lengths, rows=rows, backend=backend)
    asking = [x.clone().requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        found = mk.ragged_attention(*asking, lengths, rows=rows, backend=backend)
    assert not found.requires_grad
    assert torch.equal(found, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    query, keys, values, lengths, rows = random_case([5, 9])
    out = mk.ragged_attention(query[:0], keys, values, lengths[:0], rows=rows[:0], backend=backend)
    assert out.shape == (0, 4, 1, 16)
    assert mk.ragged_attention(query[:, :, :0], keys, values, lengths, rows=rows, backend=backend).shape == (
        2,
        4,
        0,
        16,
    )


def test_is_an_op_to_torch():
    query, keys, values, lengths, rows = random_case([5, 9])
    arguments = (query, keys, values, lengths, rows[:, None], None, 0.25, 100, 0.0, keys.shape[2], "torch")
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    found = torch.library.opcheck(ragged_attention_op, arguments, test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}
    out = mk.ragged_attention(query, keys, values, lengths, rows=rows)
    compiled = torch.compile(mk.ragged_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query, keys, values, lengths, rows=rows), out)


def test_shapes_on_a_meta_device():
    query, keys = torch.zeros(2, 4, 1, 16, device="meta"), torch.zeros(2, 2, 19, 16, device="meta")
    assert mk.ragged_attention(query, keys, keys, torch.zeros(2, dtype=torch.int64, device="meta")).shape == query.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 4, 16)}, r"query: expected 4 dimensions.* got \(2, 4, 16\)"),
        ({"keys": None}, "keys: expected a tensor, got NoneType"),
        ({"query": torch.zeros(2, 4, 1, 16).long()}, "query: expected .*, got .* torch.int64"),
        ({"query": torch.zeros(2, 3, 1, 16)}, "a multiple of the keys' 2, got 3"),
        ({"query": torch.zeros(2, 4, 30, 16)}, "at most the 19 tokens that the keys have slots for, got 30"),
        ({"keys": torch.zeros(3, 2, 19, 16).bfloat16()}, "keys: expected torch.float32 on cpu, got torch.bfloat16"),
        ({"keys": torch.zeros(3, 2, 19, 16, device="meta")}, "keys: expected .* on cpu, got torch.float32 on meta"),
        ({"keys": torch.zeros(3, 2, 19, 8)}, r"keys: expected shape \(B, H, S, 16\).* got \(3, 2, 19, 8\)"),
        ({"values": torch.zeros(3, 2, 18, 16)}, r"values: expected shape .* got \(3, 2, 18, 16\)"),
        ({"values": torch.zeros(3, 2, 16, 19).mT}, "values: expected .* the last contiguous"),
        ({"lengths": torch.tensor([1, 2, 3])}, r"lengths: expected \(2,\) int64 on cpu, got \(3,\)"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths: expected .* got .* torch.float32"),
        ({"lengths": torch.tensor([1, 19])}, r"lengths: expected values in \[0, 18\], got \[1, 19\]"),
        ({"lengths": torch.tensor([-1, 1])}, r"lengths: expected values in \[0, 18\], got \[-1, 1\]"),
        ({"rows": torch.tensor([0, 3])}, r"rows: expected values in \[0, 2\], got \[0, 3\]"),
        ({"rows": torch.tensor([0, -1])}, r"rows: expected values in \[0, 2\], got \[0, -1\]"),
        ({"rows": None}, "expected 3 rows as the keys, got 2; give rows"),
        ({"page_table": torch.tensor([[0], [1]])}, "rows: expected None with page_table, got both"),
        (
            {"rows": None, "page_table": torch.tensor([0, 1])},
            r"page_table: expected \(2, pages of a row\) int64 on cpu, got",
        ),
        ({"rows": None, "page_table": torch.zeros(3, 1).long()}, r"page_table: expected \(2, pages .* got \(3, 1\)"),
        ({"rows": None, "page_table": torch.zeros(2, 0).long()}, r"page_table: expected .* got \(2, 0\)"),
        ({"rows": None, "page_table": torch.zeros(2, 1)}, "page_table: expected .* got .* torch.float32"),
        (
            {"rows": None, "page_table": torch.zeros(2, 2).long()},
            "keys: expected pages of a multiple of 64 slots, got 19",
        ),
        ({"sinks": torch.zeros(4).long()}, "sinks: expected .* floating point .* got .* torch.int64"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks: expected .* on cpu, got .* on meta"),
        ({"sinks": torch.zeros(2)}, r"sinks: expected \(4,\) floating point on cpu, got \(2,\)"),
        ({"query": torch.zeros(2, 4, 1, 0)}, r"query: expected heads of at least one number, got shape \(2, 4, 1, 0\)"),
        ({"scale": math.inf}, r"scale: expected None or a number from -1e\+30 to 1e\+30, got inf"),
        ({"scale": 1e300}, r"scale: expected None or a number from -1e\+30 to 1e\+30, got 1e\+300"),
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
        ({"window": 2.5}, "window: expected an integer >= 1, got 2.5"),
        ({"window": True}, "window: expected an integer >= 1, got True"),
        ({"softcap": 0.0}, r"softcap: expected None or a number from 1e-30 to 1e\+30, got 0.0"),
        ({"softcap": 1e300}, r"softcap: expected None or a number from 1e-30 to 1e\+30, got 1e\+300"),
        ({"visible_length": 10.5}, "visible_length: expected an integer >= 0, got 10.5"),
        ({"visible_length": 0}, "visible_length: expected T = 1 to S = 19, got 0"),
        ({"visible_length": 20}, "visible_length: expected T = 1 to S = 19, got 20"),
        ({"visible_length": 9}, r"lengths: expected values in \[0, 8\], got \[5, 9\]"),
        ({"backend": "cuda"}, "backend: expected one of"),
    ],
)
def test_wrong_arguments(changes, message):
    query, keys, values, lengths, rows = random_case([5, 9])
    arguments = {"query": query, "keys": keys, "values": values, "lengths": lengths, "rows": rows} | changes
    with pytest.raises(ValueError, match=message):
        mk.ragged_attention(**arguments)


def test_lengths_that_are_symbols():
    """torch.export without strict tracing, and NumPy's integers."""

    class Attend(torch.nn.Module):
        def forward(self, query, keys, lengths):
            return mk.ragged_attention(query, keys, keys, lengths, visible_length=keys.shape[2], window=32)

    slots = torch.export.Dim("slots", min=8, max=500)
    query, lengths = torch.randn(2, 2, 1, 16), torch.tensor([3, 9])
    keys = torch.randn(2, 2, 40, 16)
    program = torch.export.export(
        Attend(), (query, keys, lengths), dynamic_shapes=({}, {2: slots}, {}), strict=False
    ).module()
    expected = Attend()(query, keys, lengths)
    torch.testing.assert_close(program(query, keys, lengths), expected)
    found = mk.ragged_attention(query, keys, keys, lengths, visible_length=np.int64(40), window=np.int64(32))
    torch.testing.assert_close(found, expected)
    nothing = mk.ragged_attention(query[:, :, :0], keys, keys, lengths, visible_length=0)
    assert nothing.shape == (2, 2, 0, 16)

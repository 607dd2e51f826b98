"""The Triton kernels of `ragged_attention`: on a GPU, else in Triton's interpreter.

The interpreter takes some 5 ms for a program and for a tile, whatever its size. So tests cut the work small: tiles have
16 queries and 16 slots, and splits 2 tiles, of which 2 are combined at a time.
"""

import pytest
import torch
from attention_cases import assert_matches_definition, expected, in_pages, random_case

import motab_kernels as mk

pytest.importorskip("triton")

from motab_kernels.gpu import attention as gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [0, 31, 130]  # none; with a new token, to the end of a split; many splits, the last combined by itself

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("fresh_memory_is_filled"),  # the workspace and the output
]


SMALL = gpu.Settings(split=32, slots_per_query=1, queries=16, slots=16, split_tokens=16, splits=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(gpu, "settings_for", lambda device: SMALL)


def triton(query, keys, values, lengths, rows=None, sinks=None, page_table=None, **options):
    """The op on the device under test; the output on the host."""
    tensors = (x.to(DEVICE) for x in (query, keys, values, lengths))
    tables = {"rows": rows, "sinks": sinks, "page_table": page_table}
    given = {name: None if x is None else x.to(DEVICE) for name, x in tables.items()}
    return mk.ragged_attention(*tensors, **given, **options, backend="triton").cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "group", "D"), [(1, 2, 64), (5, 7, 8), (16, 1, 128), (11, 3, 80), (19, 2, 16)])
def test_shapes(dtype, T, group, D):
    """One token; queries that fill no tile; those that do; a head that fills none; more tokens than are split."""
    lengths, H = (LENGTHS, 2) if T == 1 else ([3, 70], 1)
    case = random_case(lengths, T, H, group, D, dtype, seed=T)
    assert_matches_definition(triton(*case), *case)


SINKS = torch.tensor([-1.0, 0.5, 3.0, 40.0])
OPTIONS = {
    "window": {"window": 20},
    "window of one": {"window": 1},
    "softcap": {"softcap": 0.7},
    "high softcap": {"softcap": 50.0},
    "sinks": {"sinks": SINKS},
    "scale": {"scale": -0.6},
    "all": {"window": 40, "softcap": 2.0, "sinks": SINKS, "scale": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("T", [1, 9, 17])
def test_options(options, T):
    """Split and, with 17 tokens, not; with more than one, a tile ends within a token's heads and within a window."""
    case = random_case(LENGTHS, T, H=2, seed=T) if T == 1 else random_case([0, 70], T, H=1, group=4, seed=T)
    assert_matches_definition(triton(*case, **options), *case, **options)


def test_a_query_may_see_nothing_in_its_first_tile(monkeypatch):
    """Its window begins after the first tile of those that its tile of queries reads."""
    settings = gpu.Settings(split=32, queries=32, slots=16, split_tokens=0)
    monkeypatch.setattr(gpu, "settings_for", lambda device: settings)
    case = random_case([3], 32, H=1, group=1, dtype=torch.bfloat16)
    assert_matches_definition(triton(*case, window=5), *case, window=5)


def test_softcap_keeps_the_digits_of_small_scores():
    """A cap far above them changes nothing; 1 - 2 / (1 + e^2y) alone would be off by 1e-5 here."""
    case = random_case([40], H=1)
    query, *rest = case
    torch.testing.assert_close(triton(query, *rest, softcap=3e3), triton(*case), rtol=0, atol=1e-6)


def test_scores_that_rise_and_fall():
    """A split's scores may lie far above or below those of all others."""
    query, keys, _, _, rows = case = random_case([100, 100], H=1)
    for i, slope in enumerate((0.1, -0.1)):
        keys[rows[i], 0, :101] = query[i, 0, 0] * slope * torch.arange(101)[:, None]
    assert expected(*case).isfinite().all()
    assert_matches_definition(triton(*case), *case)


@pytest.mark.parametrize("T", [1, 16, 17])
def test_a_row_does_not_depend_on_its_batch(T):
    """Nor on the bound that the host knows, which may leave a short row one split, nor on whether its row of the cache
    is named, to the bit."""
    case = query, keys, values, lengths, rows = random_case([3, 40, 90], T, H=1)
    whole = triton(*case, window=60)
    assert torch.equal(whole, triton(*case, window=60, visible_length=90 + T))
    for i in range(3):
        own = query[i : i + 1], keys, values, lengths[i : i + 1], rows[i : i + 1]
        assert torch.equal(triton(*own, window=60, visible_length=int(lengths[i]) + T)[0], whole[i])
    assert torch.equal(triton(query, keys[rows], values[rows], lengths, window=60), whole)


@pytest.mark.parametrize("page_size", [64, 96 * 2])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("T", "split"), [(1, 32), (1, 128), (17, 32)])
def test_a_row_in_pages(T, split, window, page_size, monkeypatch):
    """To the bit as in one piece, whether a page holds splits or a split pages; in front of the window there is NaN."""
    monkeypatch.setattr(gpu, "settings_for", lambda device: SMALL._replace(split=split))
    lengths = [0, 63, 130] if T == 1 else [3, 118]
    case = random_case(lengths, T, H=1, seed=T)
    if window is not None:
        for row, length in zip(case[4].tolist(), lengths, strict=True):
            for x in case[1:3]:
                x[row, :, : max(0, length + 1 - window)] = torch.nan
    *paged, table = in_pages(*case, page_size)
    out = triton(*paged, page_table=table, window=window)
    assert_matches_definition(out, *case, window=window)
    assert torch.equal(out, triton(*case, window=window))


def test_a_tile_is_no_longer_than_a_page(monkeypatch):
    settings = gpu.Settings(split=128, queries=16, slots=128)
    monkeypatch.setattr(gpu, "settings_for", lambda device: settings)
    case = random_case([0, 63, 150], H=1)
    *paged, table = in_pages(*case, 64)
    assert_matches_definition(triton(*paged, page_table=table), *case)


def test_a_window_that_reaches_every_slot_is_none():
    case = random_case([0, 50], 2, H=1)
    torch.testing.assert_close(triton(*case, window=52), triton(*case), rtol=0, atol=1e-6)


@pytest.mark.parametrize("T", [1, 17])
def test_lengths_out_of_range_are_taken_for_the_nearest(T):
    """On a GPU, where nobody looks before. No slot and no split beyond the bound is touched."""
    query, keys, values, _, rows = case = random_case([0, 40], T, H=1, spare=33)
    out = torch.empty_like(query).to(DEVICE)
    wrong = torch.tensor([-7, 2**40])
    given = (x.to(DEVICE) for x in (query, keys, values, wrong, rows[:, None]))
    gpu.ragged_attention(*given, None, query.shape[-1] ** -0.5, keys.shape[2], 0.0, 40 + T, out)
    assert torch.equal(out.cpu(), triton(*case))


def test_sinks_of_another_dtype_and_stride():
    case = random_case([7, 33], H=2)
    spread = torch.stack((SINKS, torch.full((4,), torch.nan)), 1).bfloat16()[:, 0]
    assert torch.equal(triton(*case, sinks=spread), triton(*case, sinks=SINKS))


def test_nan_in_a_slot_that_is_seen_stays():
    _, keys, values, _, rows = case = random_case([50, 50, 50], H=1)
    keys[rows[0], 0, 3], values[rows[1], 0, 50] = torch.nan, torch.nan
    assert triton(*case).isnan().all((1, 2, 3)).tolist() == [True, True, False]


@pytest.mark.parametrize(("group", "T"), [(1, 1), (8, 1), (2, 16), (4, 16), (8, 16), (1, 64), (4, 64), (8, 64)])
@pytest.mark.parametrize("page_size", [64, 32768])
def test_partial_sums_are_few_beside_keys_and_values(group, T, page_size, monkeypatch):
    """Less than 15 % of their bytes, written and read, in bfloat16, while there is a program for 1024 slots of a head;
    64 rows are split as one is. The tensors have no memory."""
    B, H, S, D = 64, 8, 32768, 128
    pages = S // page_size
    keys = torch.empty(B * pages, H, page_size, D, dtype=torch.bfloat16, device="meta")
    table = torch.empty(B, pages, dtype=torch.int64, device="meta")
    launches = []
    monkeypatch.setattr(gpu, "settings_for", lambda device: gpu.DEFAULT)
    monkeypatch.setattr(gpu, "launch", lambda *launched, **options: launches.append(launched))
    for b in (1, B):
        query = torch.empty(b, H * group, T, D, dtype=torch.bfloat16, device="meta")
        gpu.ragged_attention(query, keys, keys, table[:b, 0], table[:b], None, 0.1, S, 0.0, S, query)
    assert [kernel for kernel, *_ in launches] == [gpu.split_kernel, gpu.combine_kernel] * 2
    (_, alone, _), _, (_, together, arguments), _ = launches
    assert alone[1] == together[1] == arguments["partial_ptr"].shape[1]
    assert alone[0] * alone[1] >= H * S / 1024
    assert 2 * arguments["partial_ptr"].nbytes < 0.15 * 2 * keys.nbytes


def test_one_split_is_written_at_once(monkeypatch):
    """There is nothing to combine, and no workspace."""
    monkeypatch.setattr(gpu, "combine_kernel", None)
    case = random_case([3, 15], 5, H=1)
    assert_matches_definition(triton(*case), *case)


def test_a_quotient_beyond_float32():
    """Of scale and softcap; a score of 0 stays 0."""
    case = random_case([3, 15], 2, H=1)
    case = [torch.zeros_like(case[0]), *case[1:]]
    found = triton(*case, scale=1e10, softcap=1e-30)
    torch.testing.assert_close(found, triton(*case, scale=1.0))

"""The definition that `ragged_attention` is tested against, and the inputs, for every backend."""

import torch


def expected(
    query,
    keys,
    values,
    lengths,
    rows=None,
    scale=None,
    window=None,
    softcap=None,
    sinks=None,
    dtype=torch.float64,
    page_table=None,
):
    """(b, H_q, T, D) in `dtype`, one query at a time; in the inputs' own dtype this is eager attention."""
    if page_table is not None:
        keys, values = in_one_piece(keys, page_table), in_one_piece(values, page_table)
    b, H_q, T, D = query.shape
    query, keys, values = (x.to(dtype) for x in (query, keys, values))
    out = torch.empty(b, H_q, T, D, dtype=dtype)
    for i in range(b):
        row = i if rows is None else int(rows[i])
        for head in range(H_q):
            kv_head = head // (H_q // keys.shape[1])
            for j in range(T):
                end = int(lengths[i]) + j + 1
                seen = slice(0 if window is None else max(0, end - window), end)
                scores = keys[row, kv_head, seen] @ query[i, head, j] * (D**-0.5 if scale is None else scale)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((sinks[head : head + 1].to(dtype), scores))
                weights = scores.softmax(0)
                if sinks is not None:
                    weights = weights[1:]
                out[i, head, j] = weights @ values[row, kv_head, seen]
    return out


def in_one_piece(pages, page_table):
    """(b, H, n * S, D): the slots of each row one after another; a page by a wrong number is NaN."""
    nowhere = torch.full_like(pages[0], torch.nan)
    rows = [[pages[page] if 0 <= page < len(pages) else nowhere for page in row] for row in page_table.tolist()]
    return torch.stack([torch.cat(row, 1) for row in rows])


def in_pages(query, keys, values, lengths, rows, page_size, seed=0):
    """The same case with its rows cut into shuffled pages: query, keys, values, lengths and the page table.

    A page of NaN lies behind every one, pages that no row reaches are -1 in the table.
    """
    T, used = query.shape[2], [-(-(length + query.shape[2]) // page_size) for length in lengths.tolist()]
    places = iter(torch.randperm(sum(used), generator=torch.Generator().manual_seed(seed)).tolist())
    table = torch.full((len(lengths), max(used)), -1)
    pages = [x.new_full((2 * sum(used), x.shape[1], page_size, x.shape[3]), torch.nan) for x in (keys, values)]
    for i, row in enumerate(rows.tolist()):
        for place in range(used[i]):
            table[i, place] = page = 2 * next(places)
            begin, end = place * page_size, min((place + 1) * page_size, int(lengths[i]) + T)
            for target, x in zip(pages, (keys, values), strict=True):
                target[page, :, : end - begin] = x[row, :, begin:end]
    return query, *pages, lengths, table


def assert_matches_definition(out, *case, **options):
    """At every place no further from float64 than rounding the weights and the result to the dtype can take it, as
    eager attention rounds both, and a little slack."""
    query, keys, values, *rest = case
    exact, size = (expected(query, keys, x, *rest, **options) for x in (values, values.abs()))
    assert out.dtype == query.dtype
    assert out.shape == exact.shape
    rounding = torch.finfo(out.dtype).eps / 2 * (size + exact.abs())
    assert ((out - exact).abs() <= rounding + (2e-6 if out.dtype == torch.float32 else 1e-5)).all()


def random_case(lengths, T=1, H=2, group=2, D=16, dtype=torch.float32, seed=0, spare=9, gap=3):
    """Query, keys, values, lengths and rows, of H key-value heads with `group` query heads each.

    Everything that may not be read is NaN: `spare` slots (S is `max(lengths) + T + spare`) and all others at or beyond
    a row's `lengths + T`, a row of the cache that no row of queries has, and the gaps of `gap` elements between what
    lies apart. The rows of the cache are shuffled; keys lie in memory as (B, H, S, D), values as (B, S, H, D), the
    query as (b, T, H * group, D).
    """
    generator = torch.Generator().manual_seed(seed)
    b, S = len(lengths), max(lengths) + T + spare
    rows = torch.randperm(b + 1, generator=generator)[:b]

    def apart(*shape):
        *leading, size, D = shape
        return torch.full((*leading, size + 1, D + gap), torch.nan, dtype=dtype)[..., :size, :D]

    query = apart(b, T, H * group, D).transpose(1, 2)
    query[:] = torch.randn(query.shape, generator=generator)
    keys, values = apart(b + 1, H, S, D), apart(b + 1, S, H, D).transpose(1, 2)
    for row, length in zip(rows.tolist(), lengths, strict=True):
        for x in (keys, values):
            x[row, :, : length + T] = torch.randn(H, length + T, D, generator=generator)
    return query, keys, values, torch.tensor(lengths), rows

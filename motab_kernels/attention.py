"""`ragged_attention`: a few new tokens of each row attend to a key-value cache whose rows have their own lengths.

b rows of queries, B rows of the cache, T new tokens, H_q and H heads of queries and of keys, S slots, D head size. A
cache in pages has B pages of S slots, and a row lies in n of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motab_kernels.attention_checks import check_indices, check_settings, check_tensors
from motab_kernels.backend import choose_backend, implementation
from motab_kernels.tensors import is_traced

__all__ = ["ragged_attention"]


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible_length: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of new tokens over the cached ones of their own row, which end where the row ends.

    Equivalent, for query row i, its cache row r = ``rows[i]`` and its token j, where each head of keys and values is
    repeated H_q / H times::

        seen = slice(max(0, lengths[i] + j + 1 - window), lengths[i] + j + 1)
        scores = scale * query[i, :, j] @ keys[r, :, seen].mT                  # (H_q, slots seen)
        scores = softcap * tanh(scores / softcap)                              # if softcap
        weights = softmax(cat([sinks[:, None], scores], -1), -1)[:, 1:]        # without the sinks, if there are none
        out[i, :, j] = weights @ values[r, :, seen]

    so the new tokens' own keys and values are in the cache already, in slots ``lengths[i]`` to ``lengths[i] + T - 1``.
    The kernels read each row up to its length, in place: no mask, no padding to the longest row, no copy. Slots that no
    token of a row sees do not matter, even if they hold NaN. Sums are float32. Batch invariant: a row's numbers do not
    depend on other rows.

    With ``page_table`` the keys that query row i reads are, and its values in the same way::

        cat([keys[page] for page in page_table[i]], dim=1)                     # (H, n * S, D)

    where only pages with a slot that is seen are read. With S a multiple of 256 the numbers are, to the bit, those of
    rows that lie in one piece.

    Not differentiable.

    Args:
        query: (b, H_q, T, D), any strides with the last 1; float32, bfloat16 or float16; "torch" also takes float64.
        keys, values: (B, H, S, D), in the query's dtype, any strides with the last 1. H divides H_q.
        lengths: (b,) int64, tokens of each row before the new ones, at most S - T (n * S - T in pages). On a GPU larger
            values are clamped, since a check would make the host wait.
        rows: (b,) int64, the row of the cache that each row of queries reads, in [0, B). None: all in order.
        page_table: (b, n) int64, instead of ``rows``: the pages, in [0, B), that hold the slots of each row, in order;
            a page without a slot that is seen may be any number. S must be a multiple of 64 if n > 1.
        scale: of the scores, -1e30 to 1e30. None: ``D ** -0.5``.
        window: slots that a token sees, its own included; > 0. None: all.
        softcap: 1e-30 to 1e30, bounds the scores (Gemma 2). None: no bound.
        sinks: (H_q,), floating point: scores without values that take a share of the weights (gpt-oss). None: none.
        visible_length: a bound on ``lengths + T`` that the host knows, at most S: it decides how many programs a GPU
            starts. None: S.
        backend: "triton" (on a GPU), "cpu" (C++) or "torch". None: the kernels of the device where they are installed
            and the tensors are not float64, else "torch".

    Returns:
        (b, H_q, T, D) in the query's dtype, in memory as (b, T, H_q, D).

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit; on the CPU a length or row out of range.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1, and its split over the keys for decoding.
    """
    check_tensors(query, keys, values, lengths, rows, page_table, sinks)
    if rows is not None:
        page_table = rows[:, None]  # a row is a page
    S, T = keys.shape[2] * (1 if page_table is None else page_table.shape[1]), query.shape[2]
    window, visible_length = check_settings(scale, window, softcap, visible_length, S, T)
    backend = choose_backend(backend, query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    is_registered = query.is_meta or is_traced(query, keys, values, lengths, page_table, sinks)
    run = ragged_attention_op if is_registered else _ragged_attention
    query, keys, values = query.detach(), keys.detach(), values.detach()
    return run(query, keys, values, lengths, page_table, sinks, scale, window, softcap or 0.0, visible_length, backend)


def _ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    visible_length: int,
    backend: str,
) -> Tensor:
    b, H_q, T, D = query.shape
    out = query.new_empty(b, T, H_q, D).transpose(1, 2)
    if out.numel() == 0:
        return out
    if query.device.type == "cpu":
        check_indices(lengths, page_table, keys, T, window, visible_length)
    if backend != "torch":  # of a tensor that is negated only when it is read, the memory holds other values
        query, keys, values = query.resolve_neg(), keys.resolve_neg(), values.resolve_neg()
    attend = implementation("attention", backend, query.device).ragged_attention
    inputs = (query, keys, values, lengths, page_table, sinks, scale, window, softcap)
    if backend == "triton":
        attend(*inputs, visible_length, out)
    elif backend == "cpu":
        attend(*inputs, out)
    else:
        with torch.autocast(query.device.type, enabled=False):  # in float32
            attend(*inputs, out)
    return out


ragged_attention_op = torch.library.custom_op("motab_kernels::ragged_attention", _ragged_attention, mutates_args=())


@ragged_attention_op.register_fake
def _(query: Tensor, *args: object, **kwargs: object) -> Tensor:
    b, H_q, T, D = query.shape
    return query.new_empty(b, T, H_q, D).transpose(1, 2)

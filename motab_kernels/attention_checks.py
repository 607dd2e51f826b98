"""Checks of the arguments of `ragged_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from motab_kernels.arguments import DIVISORS, check_count, check_whole, is_number
from motab_kernels.tensors import DTYPES

PAGE_MULTIPLE = 64  # of a page's slots, if rows have several pages: a tile of slots lies in one page


def check_tensors(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    page_table: Tensor | None,
    sinks: Tensor | None,
) -> None:
    for name, x in (("query", query), ("keys", keys), ("values", values)):
        check_whole(name, x)
        if x.dim() != 4 or x.dtype not in DTYPES or (x.shape[-1] > 1 and x.stride(-1) != 1):
            expected = "4 dimensions, the last contiguous, of float32, bfloat16, float16 or float64"
            raise ValueError(f"{name}: expected {expected}, got {tuple(x.shape)} {x.dtype} with strides {x.stride()}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(f"{name}: expected {query.dtype} on {query.device}, got {x.dtype} on {x.device}")
    b, H_q, _, D = query.shape
    B, H, S, _ = keys.shape
    if D == 0:
        raise ValueError(f"query: expected heads of at least one number, got shape {tuple(query.shape)}")
    for name, x in (("keys", keys), ("values", values)):
        if x.shape != (B, H, S, D):
            raise ValueError(f"{name}: expected shape (B, H, S, {D}) as the keys and the query, got {tuple(x.shape)}")
    if H == 0 or H_q % H:
        raise ValueError(f"query: expected heads that are a multiple of the keys' {H}, got {H_q}")
    if rows is None and page_table is None and b != B:
        raise ValueError(f"query: expected {B} rows as the keys, got {b}; give rows")
    if page_table is not None:
        _check_page_table(page_table, b, S, query.device)
        if rows is not None:
            raise ValueError("rows: expected None with page_table, got both; choose rows of the table")
    for name, index in (("lengths", lengths), ("rows", rows)):
        if index is not None and (index.shape != (b,) or index.dtype != torch.int64 or index.device != query.device):
            got = f"{tuple(index.shape)} {index.dtype} on {index.device}"
            raise ValueError(f"{name}: expected ({b},) int64 on {query.device}, got {got}")
    if sinks is not None and (sinks.shape != (H_q,) or not sinks.is_floating_point() or sinks.device != query.device):
        got = f"{tuple(sinks.shape)} {sinks.dtype} on {sinks.device}"
        raise ValueError(f"sinks: expected ({H_q},) floating point on {query.device}, got {got}")


def _check_page_table(page_table: Tensor, b: int, S: int, device: torch.device) -> None:
    is_table = page_table.dim() == 2 and len(page_table) == b and page_table.shape[1] > 0
    if not is_table or page_table.dtype != torch.int64 or page_table.device != device:
        got = f"{tuple(page_table.shape)} {page_table.dtype} on {page_table.device}"
        raise ValueError(f"page_table: expected ({b}, pages of a row) int64 on {device}, got {got}")
    if page_table.shape[1] > 1 and S % PAGE_MULTIPLE:
        raise ValueError(f"keys: expected pages of a multiple of {PAGE_MULTIPLE} slots, got {S}")


def check_settings(
    scale: float | None, window: int | None, softcap: float | None, visible_length: int | None, S: int, T: int
) -> tuple[int, int]:
    """The window and the visible length, as numbers."""
    least, most = DIVISORS
    if scale is not None and not (is_number(scale) and -most <= scale <= most):
        raise ValueError(f"scale: expected None or a number from {-most:g} to {most:g}, got {scale!r}")
    if softcap is not None and not (is_number(softcap) and least <= softcap <= most):
        raise ValueError(f"softcap: expected None or a number from {least:g} to {most:g}, got {softcap!r}")
    if window is not None:
        check_count("window", window)
    if visible_length is not None:
        check_count("visible_length", visible_length, minimum=0)
    if T > S:
        raise ValueError(f"query: expected at most the {S} tokens that the keys have slots for, got {T}")
    if visible_length is not None and not T <= visible_length <= S:
        raise ValueError(f"visible_length: expected T = {T} to S = {S}, got {visible_length}")
    return S if window is None else min(window, S), S if visible_length is None else visible_length


def check_indices(
    lengths: Tensor, page_table: Tensor | None, keys: Tensor, T: int, window: int, visible_length: int
) -> None:
    """Values, which are checked on the CPU only: there the host does not wait."""
    B, S = keys.shape[0], keys.shape[2]
    most = visible_length - T
    if int(lengths.min()) < 0 or int(lengths.max()) > most:
        raise ValueError(f"lengths: expected values in [0, {most}], got {lengths.tolist()}")
    if page_table is None:
        return
    place = torch.arange(page_table.shape[1], device=page_table.device)
    first, last = (lengths + 1 - window).clamp(min=0) // S, (lengths + T - 1) // S
    seen = (place >= first[:, None]) & (place <= last[:, None])
    wrong = (seen & ((page_table < 0) | (page_table >= B))).any(1)
    if bool(wrong.any()):
        name, got = ("rows", page_table[:, 0]) if page_table.shape[1] == 1 else ("page_table", page_table[wrong][0])
        raise ValueError(f"{name}: expected values in [0, {B - 1}], got {got.tolist()}")

"""`ragged_attention` on Triton, flash decoding: one launch reads keys and values, the slots of a row split among
programs; a second combines the splits.

b rows of queries, T new tokens, H_q and H heads of queries and of keys, D head size; pages of S slots, n of a row. No
atomics, and the host does not wait. The formulas are in `attention_split`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from motab_kernels.gpu import launch, launched_on
from motab_kernels.gpu.attention_combine import combine_kernel
from motab_kernels.gpu.attention_split import split_kernel
from motab_kernels.gpu.online_softmax import log2_e
from motab_kernels.gpu.tuned import tuned


class Settings(NamedTuple):
    """How the work is divided."""

    split: int = 256  # slots, at least, a multiple of a tile's
    slots_per_query: int = 16  # of a split, at least, a power of two
    queries: int = 64  # of a tile, at most
    sums: int = 8192  # of a tile's queries, at most: they are in registers
    slots: int = 64  # of a tile, at most
    elements: int = 8192  # of a tile of keys, at most
    num_warps: int = 4
    float32_warps: int = 8  # no tensor cores on NVIDIA: with 4 warps registers spill
    num_stages: int = 2
    split_tokens: int = 64  # more new tokens than this make enough programs without splits
    splits: int = 16  # that are combined at a time


DEFAULT = Settings()
HIP = Settings(float32_warps=4)  # a wave has 64 threads, and matrix units take float32


def settings_for(device: torch.device) -> Settings:
    return tuned("attention", device, DEFAULT, HIP)


@functools.lru_cache(maxsize=256)
def split_length(queries: int, settings: Settings) -> int:
    """Slots of a split that `queries` of a kv head share: the more, the longer.

    Each leaves 4 (D + 4) bytes of sums in a split, which are written and read: at 16 slots a query some 13 % of the
    bytes of keys and values in bfloat16. Queries that fill several tiles make more programs of a split. A row's numbers
    depend on the length of its splits, which must therefore not depend on the batch.
    """
    return max(settings.split, settings.slots_per_query * triton.next_power_of_2(queries))


@functools.lru_cache(maxsize=256)
def blocks(queries: int, D: int, itemsize: int, piece: int, settings: Settings) -> dict[str, int]:
    """The sizes of tiles: of queries, of slots (it divides `piece`) and of a head, 16 at least for `tl.dot`; and warps.

    For float32, whose products use no tensor core, a quarter: a thread keeps its factors in registers.
    """
    size, share = max(16, triton.next_power_of_2(D)), 4 if itemsize == 4 else 1
    most = min(settings.queries, settings.sums // size) // share
    return {
        "M_BLOCK": max(16, min(most, triton.next_power_of_2(queries))),
        "N_BLOCK": max(16, min(piece, settings.slots, settings.elements // share // size)),
        "D_BLOCK": size,
        "num_warps": settings.float32_warps if itemsize == 4 else settings.num_warps,
    }


def ragged_attention(
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
    out: Tensor,
) -> None:
    """Write `out` (b, H_q, T, D). `softcap` 0: none; `page_table` None: row i lies in page i.

    The kernels clamp `lengths` to between 0 and `visible_length` - T: the workspace has no place for more splits.
    """
    b, H_q, T, D = query.shape
    H, S = keys.shape[1:3]
    settings = settings_for(query.device)
    queries = T * H_q // H
    pages = 1 if page_table is None else page_table.shape[1]
    split = split_length(queries, settings)
    page = S if pages > 1 else 0
    piece = math.gcd(split, page)  # a tile lies in one split and one page
    tiles = blocks(queries, D, query.element_size(), piece, settings)
    for name, x in (("keys", keys), ("values", values)):
        if x.stride(2) * tiles["N_BLOCK"] >= 1 << 31:
            raise ValueError(
                f"{name}: expected slots less than {(1 << 31) // tiles['N_BLOCK']} numbers apart, got a stride of "
                f'{x.stride(2)}: copy them by contiguous(), or use backend "torch"'
            )
    splits = 1 if T > settings.split_tokens else -(-visible_length // split)
    is_split = splits > 1  # else the numbers are the same: combining one split changes none
    # (b, H, T, GROUP, splits, D + 4): acc, top, total, and two that keep rows aligned to 16 bytes.
    shape = (b * H * queries, splits, D + 4) if is_split else (0,)
    partial = torch.empty(shape, dtype=torch.float32, device=query.device)
    # An absent tensor's pointer is never read.
    arguments = {
        **tiles,
        "query_ptr": query,
        "query_stride_b": query.stride(0),
        "query_stride_h": query.stride(1),
        "query_stride_t": query.stride(2),
        "keys_ptr": keys,
        "keys_stride_b": keys.stride(0),
        "keys_stride_h": keys.stride(1),
        "keys_stride_s": keys.stride(2),
        "values_ptr": values,
        "values_stride_b": values.stride(0),
        "values_stride_h": values.stride(1),
        "values_stride_s": values.stride(2),
        "lengths_ptr": lengths,
        "lengths_stride_b": lengths.stride(0),
        "HAS_PAGE_TABLE": page_table is not None,
        "page_table_ptr": lengths if page_table is None else page_table,
        "page_table_stride_b": 0 if page_table is None else page_table.stride(0),
        "page_table_stride_n": 0 if page_table is None else page_table.stride(1),
        "PAGE": page,
        "HAS_SINKS": sinks is not None,
        "sinks_ptr": query if sinks is None else sinks,
        "sinks_stride_h": 0 if sinks is None else sinks.stride(0),
        "partial_ptr": partial,
        "out_ptr": out,
        "out_stride_b": out.stride(0),
        "out_stride_h": out.stride(1),
        "out_stride_t": out.stride(2),
        # A quotient beyond float32 is as good as its largest: tanh is 1, and of a score of 0 it must be 0.
        "scale": max(-3e38, min(scale / softcap, 3e38)) if softcap else scale * log2_e(),
        "HAS_SOFTCAP": softcap > 0,
        "softcap": softcap * log2_e(),
        "HAS_WINDOW": window < pages * S,
        "window": window,
        "visible_length": visible_length,
        "T": T,
        "H": H,
        "GROUP": H_q // H,
        "D": D,
        "IS_SPLIT": is_split,
        "SPLIT": split,
        "S": splits,
        "S_BLOCK": settings.splits,
    }
    grid = (b * H * -(-queries // tiles["M_BLOCK"]), splits)
    with launched_on(query.device):
        launch(split_kernel, grid, arguments, num_warps=tiles["num_warps"], num_stages=settings.num_stages)
        if is_split:
            launch(combine_kernel, (b * H * queries,), arguments, num_warps=settings.num_warps)

"""Rows of a left-padded key-value cache cut and end-aligned again, in place, all layers in one launch.

In row b of every storage (H, S, D), slots [starts[b], starts[b] + lengths[b]) move to end at slot ``width``; see
``motab_kernels/reference/kv_cache.py``. Bits are copied, so the dtype does not matter: a word is the widest integer
that all addresses, strides and head sizes are multiples of. N storages, B rows, H heads, S slots, D words a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from motab_kernels.gpu import launch, launched_on
from motab_kernels.tensors import on_device

WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _realign_kernel(
    table_ptr,  # (N, 6) int64: address, then strides and sizes in words
    starts_ptr,  # (B,) int64
    lengths_ptr,  # (B,) int64
    width,
    num_heads,  # the largest H
    WORD: tl.constexpr,
    DIVISIBLE: tl.constexpr,  # strides and D in words are multiples of this, which makes 16-byte accesses
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLEAR_PADDING: tl.constexpr,
):
    # One program owns a head of a row, so that it can order the overlapping moves.
    row = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    table = table_ptr + tl.program_id(1) * 6
    address = tl.load(table)
    row_stride = tl.multiple_of(tl.load(table + 1), DIVISIBLE)
    head_stride = tl.multiple_of(tl.load(table + 2), DIVISIBLE)
    slot_stride = tl.multiple_of(tl.load(table + 3), DIVISIBLE)
    if head >= tl.load(table + 4):
        return
    head_size = tl.multiple_of(tl.load(table + 5), DIVISIBLE)
    storage = tl.multiple_of(address.to(tl.pointer_type(WORD)), DIVISIBLE * WORD.primitive_bitwidth // 8)
    storage += row * row_stride + head * head_stride
    start = tl.load(starts_ptr + row)
    length = tl.load(lengths_ptr + row)
    padding = width - length

    block = tl.arange(0, BLOCK_S)[:, None].to(tl.int64)
    word = tl.arange(0, BLOCK_D)[None, :]
    blocks = tl.cdiv(length, BLOCK_S)
    if start == padding:
        blocks = blocks * 0
    for step in range(blocks):
        # Rightward moves begin at the end, so that no source is overwritten before it is read.
        index = step
        if start < padding:
            index = blocks - 1 - step
        token = index * BLOCK_S + block
        mask = (token < length) & (word < head_size)
        words = tl.load(storage + (start + token) * slot_stride + word, mask=mask)
        # Source and destination of a block overlap too: all of it is read before any of it is written.
        tl.debug_barrier()
        tl.store(storage + (padding + token) * slot_stride + word, words, mask=mask)
    if CLEAR_PADDING:
        # The barrier of the last block has seen every source read.
        for step in range(tl.cdiv(padding, BLOCK_S)):
            slot = step * BLOCK_S + block
            mask = (slot < padding) & (word < head_size)
            tl.store(storage + slot * slot_stride + word, tl.zeros((BLOCK_S, BLOCK_D), WORD), mask=mask)


def realign_(
    storages: Sequence[Tensor], starts: Sequence[int], lengths: Sequence[int], width: int, *, clear_padding: bool
) -> None:
    """Realign every storage (B, H, S, D), all on one device and contiguous along D, in one launch. In place."""
    device = storages[0].device
    in_bytes = [
        (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3]), x.shape[3] * x.element_size())
        for x in storages
    ]
    common = math.gcd(16, *(number for numbers in in_bytes for number in numbers))
    word = min(common, 8)
    table = [
        (address, row // word, head // word, slot // word, x.shape[1], size // word)
        for x, (address, row, head, slot, size) in zip(storages, in_bytes, strict=True)
    ]
    block_d = triton.next_power_of_2(max(size for *_, size in table))
    num_heads = max(x.shape[1] for x in storages)
    numbers = on_device([*(number for row in table for number in row), *starts, *lengths], device)
    B = len(starts)
    arguments = {
        "table_ptr": numbers,
        "starts_ptr": numbers[-2 * B : -B],
        "lengths_ptr": numbers[-B:],
        "width": width,
        "num_heads": num_heads,
        "WORD": WORDS[word],
        "DIVISIBLE": common // word,
        "BLOCK_S": max(1, 4096 // block_d),
        "BLOCK_D": block_d,
        "CLEAR_PADDING": clear_padding,
    }
    with launched_on(device):
        launch(_realign_kernel, (B * num_heads, len(storages)), arguments, num_warps=8)

"""Rows of a left-padded key-value cache, cut and end-aligned again: the definition."""

from collections.abc import Sequence

from torch import Tensor


def realign_(
    storages: Sequence[Tensor], starts: Sequence[int], lengths: Sequence[int], width: int, *, clear_padding: bool
) -> None:
    """In row i of every storage (B, H, S, D), move slots [starts[i], starts[i] + lengths[i]) to end at slot ``width``.

    ``clear_padding`` zeroes the slots before them. Slots from ``width`` on keep whatever they held.
    """
    for storage in storages:
        # Autograd lets no row of a tensor with a gradient be written; of a detached one it still sees that it is.
        for row, start, length in zip(storage.detach(), starts, lengths, strict=True):
            padding = width - length
            if start != padding:
                # The two ranges may overlap.
                row[:, padding:width] = row[:, start : start + length].clone()
            if clear_padding:
                row[:, :padding] = 0

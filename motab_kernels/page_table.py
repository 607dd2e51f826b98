"""Which pages of a key-value cache hold the slots of each row: the host assigns them, the device looks them up.

B rows of the cache, b rows of one forward pass, q new tokens, n pages of a row at most, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motab_kernels.arguments import check_count, is_integer
from motab_kernels.attention_checks import PAGE_MULTIPLE
from motab_kernels.tensors import on_device


class PageTable:
    """The pages of each row, assigned and taken back by the host.

    Slots for which a row has no page lie in an extra page, numbered `num_pages`, which belongs to no row: padding is
    written there, and its contents mean nothing.

    Attributes:
        of_row: the pages of each row, numbers in order.
        table: (B, n) int64 on the device, for `ragged_attention`.
    """

    def __init__(self, batch_size: int, max_length: int, num_pages: int, page_size: int, device: torch.device):
        check_count("num_pages", num_pages)
        if not is_integer(page_size) or page_size < 1 or page_size % PAGE_MULTIPLE:
            raise ValueError(f"page_size: expected a multiple of {PAGE_MULTIPLE} tokens, got {page_size!r}")
        self.num_pages, self.page_size, self.max_length = num_pages, page_size, max_length
        self.of_row: list[list[int]] = [[] for _ in range(batch_size)]
        self.free = list(reversed(range(num_pages)))
        with torch.inference_mode(False):
            self.table = torch.full((batch_size, -(-max_length // page_size)), num_pages, device=device)

    def needed(self, lengths: Sequence[int]) -> list[int]:
        """The number of pages that each row needs for `lengths` tokens."""
        if len(lengths) != len(self.of_row) or not all(0 <= length <= self.max_length for length in lengths):
            expected = f"{len(self.of_row)} lengths in [0, {self.max_length}]"
            raise ValueError(f"lengths: expected {expected}, got {list(lengths)}")
        return [-(-length // self.page_size) for length in lengths]

    def reserve_(self, lengths: Sequence[int]) -> None:
        """Assign each row the pages for its `lengths` tokens and take back the others; or raise and change none."""
        needed = self.needed(lengths)
        if sum(needed) > self.num_pages:
            raise ValueError(
                f"lengths: expected what {self.num_pages} pages of {self.page_size} tokens hold, got {list(lengths)}, "
                f"which need {sum(needed)}: reserve less, or build the cache with more num_pages"
            )
        before = [list(pages) for pages in self.of_row]
        for pages, count in zip(self.of_row, needed, strict=True):
            while len(pages) > count:
                self.free.append(pages.pop())
        for pages, count in zip(self.of_row, needed, strict=True):
            while len(pages) < count:
                pages.append(self.free.pop())
        if self.of_row != before:
            n = self.table.shape[1]
            self.table.copy_(
                on_device([pages + [self.num_pages] * (n - len(pages)) for pages in self.of_row], self.table.device)
            )

    def check_room(self, lengths: Sequence[int], rows: Sequence[int]) -> None:
        """Raise if a row holds tokens beyond its pages; a row without any page is taken for padding."""
        for row, length in zip(rows, lengths, strict=True):
            if length > (room := len(self.of_row[row]) * self.page_size) > 0:
                raise ValueError(
                    f"pages: expected room for the {length} tokens of row {row}, got room for {room}: what lay beyond "
                    "is lost; call reserve_ before the forward pass that exceeds them"
                )

    def places(self, table: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Page and slot in it, (b, q) each, of (b, q) slots of the rows of a (b, n) table."""
        return table.gather(1, slots // self.page_size), slots % self.page_size

    def in_one_piece(self, storage: Tensor, table: Tensor, length: int) -> Tensor:
        """(b, H, length, D): a copy of the first slots of the rows of a (b, n) table."""
        pages = storage[table[:, : -(-length // self.page_size)]]
        return pages.transpose(1, 2).flatten(2, 3)[:, :, :length]

    def unwritten(self, table: Tensor, slots: Tensor, length: int) -> Tensor:
        """(b, 1, length, 1) bool: which of the first slots of the rows of a (b, n) table hold nothing of these rows,
        because they lie behind the last of (b, q) slots or in no page of theirs."""
        index = torch.arange(length, device=slots.device)
        has_no_page = table[:, index // self.page_size] == self.num_pages
        return ((index > slots[:, -1:]) | has_no_page)[:, None, :, None]

    def by_page(self, mask: Tensor) -> Tensor:
        """A mask over the first slots of all rows, (B, length) bool, as one over pages, (num_pages + 1, page_size)."""
        n = -(-mask.shape[1] // self.page_size)
        padded = torch.nn.functional.pad(mask, (0, n * self.page_size - mask.shape[1]))
        out = mask.new_zeros(self.num_pages + 1, self.page_size)
        out[self.table[:, :n]] = padded.view(len(mask), n, self.page_size)
        return out

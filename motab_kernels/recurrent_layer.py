"""One layer of a `RaggedKVCache` that keeps recurrent or convolutional states, alone or beside keys and values.

A state sums up all tokens of its row: unlike keys and values it cannot be cut to any length, but it can be kept or
forgotten. So the states of all B rows stay as they were settled, while forward passes change a working copy of those of
the b rows that they feed; a truncation then settles the copy of each row that keeps all of its new tokens. A settled
state can be anchored, to go back to it later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from motab_kernels.page_table import PageTable
from motab_kernels.ragged_layer import RaggedLayer

#: Attributes of transformers' layer, each a dict of states by number.
_KINDS = ("conv_states", "recurrent_states")


class RecurrentLayer(LinearAttentionLayer):
    """The states of one layer; those that transformers knows are the working copy, of which `load` makes one."""

    def __init__(self, num_rows: int, number_of_states: int) -> None:
        super().__init__(number_of_states)
        self.num_rows = num_rows
        # (B, ...), allocated when the first ones are settled or anchored.
        self.settled: dict[tuple[str, int], Tensor] = {}
        self.anchored: dict[tuple[str, int], Tensor] = {}

    def lazy_initialization(self, **states: Any) -> None:
        with torch.inference_mode(False):  # else they could not be written outside of that mode
            super().lazy_initialization(**states)

    def working(self) -> Iterator[Tensor]:
        """The working copy."""
        return (state for kind in _KINDS for state in getattr(self, kind).values() if state is not None)

    def load(self, rows: Tensor | None) -> None:
        """Make the working copy of these rows, (b,) or None for all, from what is settled."""
        self._forget()
        for (kind, number), storage in self.settled.items():
            with torch.inference_mode(False):
                getattr(self, kind)[number] = storage.clone() if rows is None else storage.index_select(0, rows)
            getattr(self, f"is_{kind}_initialized")[number] = True
            self.has_previous_state[number] = True  # that of a row without tokens is zero, as if there were none

    def settle_(self, rows: Tensor | None, keeps: Tensor) -> None:
        """Settle the working copy of `rows` where they are kept, (b,) bool, and forget it."""
        for kind in _KINDS:
            for number, working in getattr(self, kind).items():
                if working is None:
                    continue
                if (kind, number) not in self.settled:
                    with torch.inference_mode(False):
                        self.settled[kind, number] = working.new_zeros(self.num_rows, *working.shape[1:])
                storage = self.settled[kind, number]
                before = storage if rows is None else storage.index_select(0, rows)
                found = torch.where(_by_row(keeps, working), working, before)
                if rows is None:
                    storage.copy_(found)
                else:
                    storage.index_copy_(0, rows, found)
        self._forget()

    def anchor_(self, rows: Tensor) -> None:
        """Anchor the settled states of the rows that this (B,) bool names."""
        for key, storage in self.settled.items():
            if key not in self.anchored:
                with torch.inference_mode(False):
                    self.anchored[key] = torch.zeros_like(storage)
            _copy_rows_(self.anchored[key], storage, rows)

    def go_back_(self, rows: Tensor) -> None:
        """Settle the anchored states of the rows that this (B,) bool names."""
        for key, storage in self.anchored.items():
            _copy_rows_(self.settled[key], storage, rows)

    def empty_(self, rows: Tensor) -> None:
        """Forget the settled states of the rows that this (B,) bool names."""
        for storage in self.settled.values():
            storage.masked_fill_(_by_row(rows, storage), 0)

    def _forget(self) -> None:
        for kind in _KINDS:
            for number in range(self.number_of_states):
                getattr(self, kind)[number] = None
                getattr(self, f"is_{kind}_initialized")[number] = False
                self.has_previous_state[number] = False


def _by_row(rows: Tensor, states: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (states.dim() - 1))


def _copy_rows_(storage: Tensor, states: Tensor, rows: Tensor) -> None:
    storage.copy_(torch.where(_by_row(rows, states), states, storage))


class HybridLayer(RecurrentLayer, RaggedLayer):
    """A layer with states, and with keys and values too."""

    def __init__(
        self, batch_size: int, max_length: int, is_sliding: bool, pages: PageTable | None, number_of_states: int
    ) -> None:
        RaggedLayer.__init__(self, batch_size, max_length, is_sliding, pages)
        RecurrentLayer.__init__(self, batch_size, number_of_states)

    def get_max_length(self) -> int:
        return RaggedLayer.get_max_length(self)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:
        """Called by `update` with keys and values, by transformers with named states."""
        if keys_and_values:
            RaggedLayer.lazy_initialization(self, *keys_and_values)
        else:
            RecurrentLayer.lazy_initialization(self, **states)


class RecurrentStates:
    """The states of all layers of a cache, and of which lengths they are.

    Attributes:
        settled_lengths, anchored_lengths: (B,) int64, the tokens that the settled and the anchored states of each row
            sum up. Without any a state is zero.
    """

    def __init__(self, layers: Sequence[RecurrentLayer], lengths: Tensor) -> None:
        self.layers = layers
        with torch.inference_mode(False):
            self.settled_lengths, self.anchored_lengths = lengths.clone(), lengths.clone()
        # Whether there is a working copy, of which rows, and these as `begin_` was given them.
        self.has_copy = False
        self.copied_rows: Tensor | None = None
        self.given_rows: Tensor | None = None
        # Of the last forward pass: to which of these layers it came last, and whether the last attention is to come.
        self.reached: RecurrentLayer | None = None
        self.awaits_attention = False

    @property
    def is_whole(self) -> bool:
        """Whether all layers sum up the same tokens; not after a forward pass that raised on its way through them."""
        return not self.has_copy or self.reached is (None if self.awaits_attention else self.layers[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the working copy."""
        return sum(state.nbytes for layer in self.layers for state in layer.working())

    def begin_(self, rows: Tensor | None, lengths: Tensor) -> None:
        """Before a pass that feeds these rows of the given lengths, (B,): the working copy becomes theirs, and that of
        other rows is settled."""
        if not self.is_whole:
            raise ValueError(
                "cache: expected the last forward pass to have reached the last layer, got one that raised before, and "
                f"left its tokens in a part of the states: go back to lengths = {self.settled_lengths.tolist()} first, "
                "by truncate_kv_cache_"
            )
        self.reached, self.awaits_attention = None, True
        if self.has_copy and self._is_copy_of(rows):
            return
        self.settle_(lengths, lengths)
        for layer in self.layers:
            layer.load(rows)
        self.has_copy, self.given_rows = True, rows
        self.copied_rows = None if rows is None else rows.clone()

    def _is_copy_of(self, rows: Tensor | None) -> bool:
        if rows is None or self.copied_rows is None or rows is not self.given_rows:
            return rows is self.given_rows
        return rows.device.type != "cpu" or torch.equal(rows, self.copied_rows)  # looking makes the host wait

    def reach_(self, layer: RecurrentLayer) -> None:
        """A forward pass comes to this layer."""
        if any(state.requires_grad for state in layer.working()):
            raise ValueError("states: expected tensors without gradient, got requires_grad=True: use torch.no_grad()")
        self.reached = layer

    def restorable(self, new_lengths: Tensor, lengths: Tensor) -> Tensor:
        """(B,): the most tokens that rows of these lengths can keep, up to the new ones."""
        anchored = torch.where(new_lengths >= self.anchored_lengths, self.anchored_lengths, 0)
        settled = torch.where(new_lengths >= self.settled_lengths, self.settled_lengths, anchored)
        return torch.where((new_lengths == lengths) & self.is_whole, lengths, settled)

    def anchor_(self, safe_lengths: Tensor) -> None:
        """Anchor the settled states of rows that are of at most these lengths, (B,), which later rollbacks keep; what
        was anchored of these rows before is forgotten. One more copy of all states."""
        rows = self.settled_lengths <= safe_lengths
        for layer in self.layers:
            layer.anchor_(rows)
        self.anchored_lengths.copy_(torch.where(rows, self.settled_lengths, self.anchored_lengths))

    @torch.no_grad()
    def settle_(self, new_lengths: Tensor, lengths: Tensor) -> None:
        """Keep the states of rows that keep all of their tokens, go back to those of the others, which must be
        `restorable`, and forget those of rows that keep none; (B,) both."""
        keeps = (new_lengths == lengths) & self.is_whole
        goes_back = new_lengths < self.settled_lengths
        is_empty = new_lengths == 0
        for layer in self.layers:
            if self.has_copy:
                layer.settle_(self.copied_rows, keeps if self.copied_rows is None else keeps[self.copied_rows])
            layer.go_back_(goes_back)
            layer.empty_(is_empty)
        self.settled_lengths.copy_(new_lengths)
        self.anchored_lengths.masked_fill_(is_empty, 0)
        self.has_copy = False

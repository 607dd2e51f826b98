"""A key-value cache whose rows have their own lengths, so that rolling a row back changes one number.

Shape letters: B rows of the cache, b rows of one forward pass, H heads, S slots, D head size, q new tokens; where rows
lie in pages, P of these with S slots each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache

from motab_kernels.arguments import check_count, is_integer
from motab_kernels.kv_cache_checks import check_tail, known_to_host, lengths_tensor
from motab_kernels.model_attention import RAGGED_ATTENTION, ForwardPass
from motab_kernels.page_table import PageTable
from motab_kernels.ragged_kv_cache_checks import (
    ATTENTION,
    RECURRENT,
    check_positions,
    check_reserved,
    check_rows,
    layer_types,
)
from motab_kernels.ragged_layer import RaggedLayer, at_one_address

if TYPE_CHECKING:  # versions of transformers before 5.24 have no such layers
    from motab_kernels.recurrent_layer import RecurrentStates

__all__ = ["CACHE_ARGUMENT", "RaggedKVCache"]

#: The name of the cache in a model's forward pass and in `generate`, which transformers 5.24 changed.
CACHE_ARGUMENT = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


class RaggedKVCache(Cache):
    """A preallocated transformers cache in which every row has its own length.

    Token j of row i lies in slot j of row i, in every layer, so that rolling a row back only lowers ``lengths[i]``: no
    key or value moves. Sliding-window layers keep all their tokens and are windowed by the mask, so they roll back
    exactly too. For each forward pass::

        logits = model(input_ids, **cache.prepare(input_ids.shape[1])).logits

    and ``truncate_kv_cache_(cache, new_lengths)`` afterwards drops the tokens that rows should not keep (padding at the
    end of a ragged batch, rejected tokens). Without ``prepare`` the cache serves a plain forward pass or
    ``model.generate`` as long as all rows have one length.

    Under "sdpa" and "eager" attention each pass reads all rows up to the longest one's length, through a mask, and
    copies keys and values if it feeds only some rows or if several heads of queries share one.
    `ragged_attention` does none of this: it is used after ``model.set_attn_implementation("motab_ragged")``, in a
    model whose attention can be replaced (``model._supports_attention_backend``), until another one is set.

    Every row has ``max_length`` slots of its own, unless ``num_pages`` is given: then all rows share that many pages of
    ``page_size`` tokens, and ``reserve_`` says, before a forward pass, how many tokens of each row must have room.
    Memory then grows with the tokens that rows hold, not with ``max_length``. `ragged_attention` reads pages in place;
    other attentions copy all visible slots.

    A recurrent or convolutional state sums up all tokens of its row. In a model with such layers (Qwen3.5, Granite 4,
    Nemotron-H, ...) a row can keep all of its tokens, those that it had at the last truncation, those that
    ``states.anchor_`` anchored, or none, and nothing between: keep one of these, and feed the rest of what it should
    keep again. Feed such a model no padding. A forward pass that raises leaves its tokens in a part of the states: then
    keep one of the other three.

    Args:
        config: the model's configuration. Its attention must be one of these when ``prepare`` is called.
        batch_size: rows, B.
        max_length: tokens that a row can hold, S.
        device: where keys, values and ``lengths`` live; the default device if None.
        dtype: the keys' and values' dtype; the default dtype if None. Under autocast the model's keys and values are
            cast to it.
        num_pages: number of pages that all rows share, P. None: no pages, each row lies in one piece.
        page_size: tokens of a page, a multiple of 64.

    Attributes:
        lengths: (B,) int64 on the device, tokens that each row holds. Read it; ``truncate_kv_cache_`` changes it.
        states: None, or the recurrent states: ``states.settled_lengths``, (B,) int64 on the device, is how many tokens
            each row held at the last truncation, or before a pass with other ``rows`` than the one before. Read it.
        pages: None, or the pages: ``pages.table``, (B, pages of a row) int64 on the device, is what `ragged_attention`
            takes as ``page_table``; it and ``pages.free``, a list, are read-only.

    Keys and values are allocated, zeroed, at the first forward pass. A layer passes a view of them to the attention (a
    copy when ``rows`` are given), valid until the next forward pass or truncation. Run it without gradients.

    Raises:
        ValueError: the model has a layer that keeps anything but keys and values of its own tokens and states (chunked
            or shared ones), only layers with states, or is an encoder-decoder; its positions are biases (ALiBi), or
            longrope and ``max_length`` is more than the length that its short factors serve.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_pages: int | None = None,
        page_size: int = 256,
    ) -> None:
        check_count("batch_size", batch_size)
        check_count("max_length", max_length)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("config: expected a decoder-only model, got an encoder-decoder, with cross-attention")
        self.config = config.get_text_config(decoder=True)
        check_positions(self.config, max_length)
        self.layer_types = layer_types(self.config)
        with torch.inference_mode(False):
            self.lengths = at_one_address(torch.zeros(batch_size, dtype=torch.int64, device=device))
        self.device = self.lengths.device
        self.pages: PageTable | None = None
        if num_pages is not None:
            self.pages = PageTable(batch_size, max_length, num_pages, page_size, self.device)
        super().__init__(layers=[self._layer(kind, batch_size, max_length) for kind in self.layer_types])
        # Those with keys and values, whose last one ends a forward pass, and those with states.
        self.attention_layers = [layer for layer in self.layers if isinstance(layer, RaggedLayer)]
        self.states: RecurrentStates | None = None
        if recurrent := [x for x, kind in zip(self.layers, self.layer_types, strict=True) if kind in RECURRENT]:
            from motab_kernels.recurrent_layer import RecurrentStates

            self.states = RecurrentStates(recurrent, self.lengths)
        self.max_length = max_length
        # Not named `dtype`, by which accelerate recognises tensors among a model's outputs.
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        # `visible_length` between forward passes, and during the one that is in progress.
        self._visible_length = self._visible_length_in_step = 0
        # Whether the host knows that every row has exactly visible_length tokens.
        self._is_uniform = True
        self._step: ForwardPass | None = None

    def _layer(self, kind: str, batch_size: int, max_length: int) -> Any:
        sizes = (batch_size, max_length, kind == "sliding_attention", self.pages)
        if kind in RECURRENT:
            from motab_kernels.recurrent_layer import HybridLayer, RecurrentLayer

            number_of_states = getattr(self.config, "number_of_conv_states", 1)
            if kind in ATTENTION:
                return HybridLayer(*sizes, number_of_states)
            return RecurrentLayer(batch_size, number_of_states)
        if kind in ATTENTION:
            return RaggedLayer(*sizes)
        from transformers.cache_utils import DummyLayer  # from 5.24 on, as the models that have such layers

        return DummyLayer()

    @property
    def visible_length(self) -> int:
        """A bound on ``max(lengths)`` that the host knows without asking the device. Each forward pass reads this many
        slots (and its own), unless ``prepare`` is given another bound. A forward pass raises it to what it reads, a
        truncation lowers it if it can."""
        return self._visible_length if self._step is None else self._visible_length_in_step

    # ---------------------------------------------------------------- pages

    def can_reserve(self, lengths: Sequence[int]) -> bool:
        """Whether ``reserve_`` would find enough pages."""
        return self.pages is None or sum(self.pages.needed(lengths)) <= self.pages.num_pages

    def reserve_(self, lengths: Sequence[int]) -> None:
        """Assign row i the pages for its first ``lengths[i]`` tokens, and take back its other pages.

        To be called before a forward pass that makes rows longer than was reserved, and to free pages that rows no
        longer need: a rollback keeps a row's pages. Tokens beyond the pages are padding: they may be fed, but their
        logits mean nothing. The host does not wait for a GPU. Without pages this does nothing.

        Args:
            lengths: one int for each of the B rows, at most ``max_length``.

        Raises:
            ValueError: lengths that are out of range or that the pages do not hold; nothing changes then.
        """
        if self.pages is not None:
            self.pages.reserve_(lengths)

    # ---------------------------------------------------------------- a forward pass

    def prepare(self, num_tokens: int, rows: Tensor | None = None, *, max_length: int | None = None) -> dict[str, Any]:
        """The model's arguments, besides ``input_ids``, to append ``num_tokens`` tokens to each row.

        Args:
            num_tokens: q, the width of the coming ``input_ids``.
            rows: (b,) int64 on the cache's device, distinct: the rows that ``input_ids`` (b, q) feeds, in its order.
                None: all rows in order, which saves a copy of the visible keys and values. In a model with recurrent
                states pass the same tensor, unchanged, as long as the same rows are fed.
            max_length: a bound on these rows' lengths that the host knows; slots beyond it and the new tokens are not
                read. A bound below ``visible_length`` saves time where these rows are shorter than others; one bound
                for many passes saves compilations (`torch.compile`). None: ``visible_length``.

        Returns:
            ``cache`` (this one; ``past_key_values`` before transformers 5.24), ``position_ids`` (b, q), ``use_cache``
            and ``attention_mask``: (b, 1, q, visible slots) for the model's attention (bool for "sdpa", additive for
            "eager"), or a dict of two such for a model that mixes full and sliding layers; for "motab_ragged" None,
            and its inputs in ``ragged_step``. They serve one forward pass, before any truncation. After it each of the
            rows holds q more tokens, padding included.

        Raises:
            ValueError: a wrong argument, tokens that would not fit, or an attention that reads no such mask.
        """
        step = self._begin(num_tokens, rows, max_length)
        inputs = {CACHE_ARGUMENT: self, "position_ids": step.slots, "use_cache": True}
        if self.config._attn_implementation == RAGGED_ATTENTION:
            sliding = [layer_type == "sliding_attention" for layer_type in self.layer_types]
            self._step = step._replace(windows=[self.config.sliding_window if is_it else None for is_it in sliding])
            return inputs | {"attention_mask": None, "ragged_step": self._step}
        key_slots = torch.arange(step.visible_length, device=self.device)
        causal = (key_slots <= step.slots[:, :, None])[:, None]
        # A state's layer needs a mask for padding alone, of which there is none.
        masks = dict.fromkeys(self.layer_types) | {"full_attention": self._as_attention_mask(causal)}
        if "sliding_attention" in self.layer_types:
            recent = (key_slots > step.slots[:, :, None] - self.config.sliding_window)[:, None]
            masks["sliding_attention"] = self._as_attention_mask(causal & recent)
        kinds = {"full_attention" if kind == "hybrid" else kind for kind in self.layer_types if kind in ATTENTION}
        self._step = step
        return inputs | {"attention_mask": masks if len(kinds) > 1 else masks[kinds.pop()]}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model: append to one layer, return all that it can see; the last layer ends the pass."""
        if self._step is None:
            self._require_uniform()
            if self.states is not None:
                raise ValueError(
                    "cache: expected a forward pass with what prepare gives, in a model with recurrent states, got a "
                    "plain one: call model(input_ids, **cache.prepare(num_tokens))"
                )
            self._step = self._begin(key_states.shape[2], None, None)
        step = self._step
        if torch.is_autocast_enabled(self.device.type):
            key_states, value_states = key_states.to(self._dtype), value_states.to(self._dtype)
        expected = (tuple(step.slots.shape), self._dtype, self.device)
        got = ((key_states.shape[0], key_states.shape[2]), key_states.dtype, key_states.device)
        if got != expected:
            raise ValueError(f"keys: expected (rows, tokens), dtype, device = {expected}, got {got}")
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError("keys: expected a tensor without gradient, got requires_grad=True: use torch.no_grad()")
        layer = self.layers[layer_idx]
        visible = layer.update(key_states, value_states, step)
        if layer is self.attention_layers[-1]:
            if step.rows is None:
                self.lengths += step.slots.shape[1]
            else:
                self.lengths[step.rows] = step.slots[:, -1] + 1
                self._is_uniform = False
            self._step = None
            if self.states is not None:
                self.states.awaits_attention = False
        return visible

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Called by the model where a layer with states begins."""
        if self.states is not None:
            self.states.reach_(self.layers[layer_idx])
        return super().get_conv_state(layer_idx, state_idx)

    def _begin(self, num_tokens: int, rows: Tensor | None, max_length: int | None) -> ForwardPass:
        check_count("num_tokens", num_tokens)
        if max_length is not None:
            check_count("max_length", max_length, 0)
        bound = self.visible_length if max_length is None else max_length
        visible_length = bound + num_tokens
        if visible_length > self.max_length:
            raise ValueError(
                f"num_tokens: expected at most max_length = {self.max_length} tokens a row, got up to {bound} cached "
                f"+ {num_tokens} new: build the cache with a larger max_length, or pass prepare or truncate_kv_cache_ "
                "the max_length= that bounds the rows' lengths if they are shorter than that"
            )
        check_rows(rows, len(self.lengths), self.device)
        lengths = self.lengths if rows is None else self.lengths[rows]
        if self.device.type == "cpu" and bool((lengths > bound).any()):
            raise ValueError(f"max_length: expected a bound on the rows' lengths {lengths.tolist()}, got {max_length}")
        slots = lengths[:, None] + torch.arange(num_tokens, device=self.device)
        if self.pages is not None:
            check_reserved(self.pages, rows, lengths, self.visible_length if self._is_uniform else None)
            table = self.pages.table if rows is None else self.pages.table[rows]
            places, offsets = self.pages.places(table, slots)
        else:
            table, offsets = None, slots
            places = (torch.arange(len(lengths), device=self.device) if rows is None else rows)[:, None]
        if self.states is not None:
            self.states.begin_(rows, self.lengths)
        before = self.visible_length
        # Not in `update`, where `torch.compile` would compile a graph for each value.
        self._visible_length = before + num_tokens if self._is_uniform else max(before, visible_length)
        self._visible_length_in_step = before
        return ForwardPass(rows, slots, places, offsets, table, visible_length, None)

    def _as_attention_mask(self, visible: Tensor) -> Tensor:
        attention = self.config._attn_implementation
        if attention == "sdpa":
            return visible
        if attention == "eager":
            return torch.zeros_like(visible, dtype=self._dtype).masked_fill_(~visible, torch.finfo(self._dtype).min)
        raise ValueError(
            f'attention: expected "sdpa", "eager" or "{RAGGED_ATTENTION}", got {attention!r}: load the model with '
            'attn_implementation="sdpa"'
        )

    # ---------------------------------------------------------------- rollback

    def truncate_(self, new_lengths: int | Tensor, *, tail: str = "keep", max_length: int | None = None) -> None:
        """``truncate_kv_cache_`` for this cache; see there."""
        check_tail(tail)
        lengths = lengths_tensor(new_lengths, len(self.lengths), self.device)
        on_host = self.device.type == "cpu"
        known = known_to_host(new_lengths, on_host)
        bound = max(known) if known is not None else None
        if bound is not None and bound > self.visible_length:
            raise ValueError(f"new_lengths: expected at most {self.visible_length}, got {bound}")
        if on_host and bool((lengths > self.lengths).any()):
            raise ValueError(f"new_lengths: expected at most lengths = {self.lengths.tolist()}, got {lengths.tolist()}")
        if max_length is not None:
            if not is_integer(max_length) or max_length < 0 or (bound is not None and bound > max_length):
                raise ValueError(f"max_length: expected an int that bounds new_lengths, got {max_length!r}")
            bound = max_length if bound is None else bound
        lengths = torch.minimum(lengths, self.lengths).clamp_(min=0)  # where the host does not check
        if self.states is not None:
            kept = self.states.restorable(lengths, self.lengths)
            if on_host and bool((kept != lengths).any()):
                raise ValueError(
                    f"new_lengths: expected lengths of which there are recurrent states, as {kept.tolist()}, got "
                    f"{lengths.tolist()}: keep so many, and feed the tokens behind them again"
                )
            lengths = kept
            self.states.settle_(lengths, self.lengths)
        if tail == "zero":
            self._zero_(lengths)
        self.lengths.copy_(lengths)
        # Equal requests end in equal lengths where every row is known to reach that far.
        reached = on_host or self._is_uniform or bound == 0
        self._is_uniform = known is not None and len(set(known)) == 1 and reached
        self._visible_length = self.visible_length if bound is None else min(bound, self.visible_length)
        self._step = None

    def _zero_(self, new_lengths: Tensor) -> None:
        visible_length = self.visible_length
        slots = torch.arange(visible_length, device=self.device)
        dead = (slots >= new_lengths[:, None]) & (slots < self.lengths[:, None])
        if self.pages is not None:
            dead, visible_length = self.pages.by_page(dead), self.pages.page_size
        for layer in self.attention_layers:
            if layer.is_initialized:
                for storage in (layer.keys, layer.values):
                    storage[:, :, :visible_length].masked_fill_(dead[:, None, :, None], 0)

    def reset(self) -> None:
        """Empty all rows."""
        self.truncate_(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens of every row (transformers counts them with a minus sign)."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a number <= 0, got {tokens_to_remove}")
        if self._is_uniform:
            self.truncate_(self.visible_length + tokens_to_remove)
        else:
            self.truncate_(self.lengths + tokens_to_remove)

    # ---------------------------------------------------------------- called by transformers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The length of all rows; while a prepared forward pass runs, the bound on it."""
        if self._step is not None:
            return self._step.visible_length - self._step.slots.shape[1]
        self._require_uniform()
        return self.visible_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Slots that the coming forward pass sees, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a row can hold."""
        return self.max_length

    def _require_uniform(self) -> None:
        if not self._is_uniform:
            raise ValueError(
                "lengths: expected rows of one length for a plain forward pass, got a ragged cache: call "
                "model(input_ids, **cache.prepare(num_tokens))"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: rows stay where they are."""
        raise ValueError("RaggedKVCache cannot reorder its rows: choose rows with prepare(num_tokens, rows=)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: the number of rows is fixed."""
        raise ValueError(f"RaggedKVCache has a fixed batch_size of {len(self.lengths)}: build a larger one")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: the number of rows is fixed."""
        raise ValueError("RaggedKVCache has a fixed batch_size: choose rows with prepare(num_tokens, rows=)")

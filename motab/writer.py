"""A model with its key-value cache: it appends, drafts, scores and rolls back, for any of its rows.

Invariant between calls: the cache of a row holds all of its tokens but the last, which is pending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import motab_kernels as mk
from motab import memory
from motab_kernels.model_attention import on_ragged_attention, takes_ragged_attention
from motab_kernels.tensors import on_device

Choose = Callable[[Tensor, int], Tensor]
Model = Callable[..., Any]  # as a model is called


PREFILL = 4096  # prompt tokens read at a time: enough to fill a GPU, and activations stay small


class Writer:
    """One model and the cache of its ``batch_size`` rows, in pages if these are given."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        max_length: int,
        vocab_size: int,
        pages: memory.Pages | None = None,
    ):
        self.model, self.device, self.vocab_size = model, model.device, vocab_size
        self.width = -(-vocab_size // 64) * 64  # so that each token's logits are aligned for 16-byte reads
        self.cache = mk.RaggedKVCache(
            model.config,
            batch_size,
            max_length,
            device=model.device,
            dtype=memory.cache_dtype(model),
            **({} if pages is None else pages._asdict()),
        )
        # Padding behind a row's budget may lie beyond the positions that a model with a table of them has.
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.last_position = None if limit is None or limit >= max_length else limit - 1
        # A router's loss is of no use here, and cannot be taken from a mask of four dimensions.
        has_router = getattr(model.config.get_text_config(), "output_router_logits", False)
        self.options = {"output_router_logits": False} if has_router else {}
        self.lengths = [0] * batch_size
        self.rows = list(range(batch_size))  # of the last forward pass, and their numbers on the device
        self.row_numbers: Tensor | None = None
        is_ragged = takes_ragged_attention(model)
        self.attention = on_ragged_attention if is_ragged else nullcontext
        self.tail = "keep" if is_ragged else "zero"  # a mask does not hide NaN

    def _numbers(self, rows: Sequence[int]) -> Tensor | None:
        """The rows on the device, None for all in order; cached, since a block is drafted token by token."""
        if list(rows) != self.rows:
            self.rows = list(rows)
            self.row_numbers = None if self.rows == list(range(len(self.lengths))) else on_device(rows, self.device)
        return self.row_numbers

    def _forward(self, call: Model, rows: Sequence[int], token_ids: Tensor, longest: int, **options: int) -> Tensor:
        """Feed (b, q) tokens to the given rows, none longer than `longest`; return (b, q, V) logits over the shared
        vocabulary."""
        inputs = self.cache.prepare(token_ids.shape[1], rows=self._numbers(rows), max_length=longest)
        if self.last_position is not None:
            inputs["position_ids"] = inputs["position_ids"].clamp(max=self.last_position)
        logits: Tensor = call(input_ids=token_ids, **self.options, **options, **inputs).logits
        return logits[..., : self.vocab_size]

    def _append(self, rows: Sequence[int], token_ids: Tensor, **options: int) -> Tensor:
        """`_forward` with the uncompiled model; updates `lengths`."""
        logits = self._forward(self.model, rows, token_ids, max(self.lengths[row] for row in rows), **options)
        self._lengthen(rows, token_ids.shape[1])
        return logits

    def _advance(self, rows: Sequence[int], token_ids: Tensor) -> Tensor:
        """`_append` for drafts and scores: one token or a block per row."""
        return self._append(rows, token_ids)

    def _lengthen(self, rows: Sequence[int], count: int) -> None:
        for row in rows:
            self.lengths[row] += count

    def has_room(self, lengths: dict[int, int]) -> bool:
        """Whether `reserve` would find room."""
        return self.cache.can_reserve(self._of_all(lengths))

    def reserve(self, lengths: dict[int, int]) -> None:
        """Reserve room for this many tokens in the rows named, and for none in the others."""
        self.cache.reserve_(self._of_all(lengths))

    def _of_all(self, lengths: dict[int, int]) -> list[int]:
        return [lengths.get(row, 0) for row in range(len(self.lengths))]

    def rollback(self, lengths: dict[int, int], safe: dict[int, int] | None = None) -> None:
        """Keep only the first ``lengths[row]`` tokens of each row named; no key or value moves. ``safe[row]`` are those
        that a later rollback is likely to keep, if there may be several."""
        for row, length in lengths.items():
            self.lengths[row] = length
        new_lengths = on_device(self.lengths, self.device)
        mk.truncate_kv_cache_(self.cache, new_lengths, tail=self.tail, max_length=max(self.lengths))

    def start(self, texts: dict[int, list[int]]) -> None:
        """Begin rows with new texts, and cache all but their last token."""
        self.rollback(dict.fromkeys(texts, 0))
        self.catch_up(texts, PREFILL)

    def catch_up(self, texts: dict[int, list[int]], width: int) -> None:
        """Read what another model wrote: cache all but the last token of these texts, which follow what is cached.

        A pass reads at most `width` tokens of each row, since padding needs room in the cache, and `PREFILL` of all.
        """
        unread = {row: ids[:-1] for row, ids in texts.items() if len(ids) > 1}
        rows = sorted(unread, key=lambda row: -len(unread[row]))  # similar lengths together: less padding
        while rows:
            longest = len(unread[rows[0]])
            count = max(1, PREFILL // min(longest, width))
            for begin in range(0, longest, width):
                parts = {row: unread[row][begin : begin + width] for row in sorted(rows[:count])}
                self._feed({row: ids for row, ids in parts.items() if ids})
            rows = rows[count:]

    def _feed(self, texts: dict[int, list[int]]) -> None:
        """Append tokens to rows, texts of different lengths, in one forward pass."""
        longest = max(map(len, texts.values()))
        padded = [ids + [0] * (longest - len(ids)) for ids in texts.values()]
        lengths = {row: self.lengths[row] + len(ids) for row, ids in texts.items()}
        # Padding lies after a row's own tokens, where the causal mask hides it.
        with self.attention(self.model):
            self._append(list(texts), on_device(padded, self.device), logits_to_keep=1)
        self.rollback(lengths)

    def draft(self, rows: Sequence[int], pending: Tensor, count: int, choose: Choose) -> tuple[Tensor, Tensor]:
        """Write ``count`` tokens per row after the (b,) pending ones; return (b, count) ids and (b, count, V)
        logits."""
        tokens = pending.new_empty(len(rows), count)
        logits: Tensor | None = None
        with self.attention(self.model):
            for offset in range(count):
                step = self._advance(rows, pending[:, None])[:, 0]
                if logits is None:
                    logits = step.new_empty(len(rows), count, self.width)[..., : self.vocab_size]
                # Copied at once: a compiled model overwrites its output at the next call.
                logits[:, offset] = step
                tokens[:, offset] = pending = choose(step, offset)
        assert logits is not None
        return tokens, logits

    def score(self, rows: Sequence[int], pending: Tensor, token_ids: Tensor) -> Tensor:
        """The (b, T, V) logits with which this model would have written (b, T) tokens: one forward pass."""
        with self.attention(self.model):
            return self._advance(rows, torch.cat([pending[:, None], token_ids[:, :-1]], 1))

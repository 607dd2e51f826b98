"""A model with its key-value cache: it appends, drafts, scores and forgets, for any of its rows.

Invariant between calls: the cache of a row holds all of its tokens but the last, which is pending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

import motab_kernels as mk
from motab_kernels.backend import on_device
from motab_kernels.model_attention import on_ragged_attention, takes_ragged_attention

Choose = Callable[[Tensor, int], Tensor]


class Writer:
    """One model and the cache of its ``batch_size`` rows."""

    def __init__(self, model: PreTrainedModel, batch_size: int, max_length: int, vocab_size: int):
        self.model, self.device, self.vocab_size = model, model.device, vocab_size
        self.cache = mk.RaggedKVCache(model.config, batch_size, max_length, device=model.device, dtype=model.dtype)
        self.lengths = [0] * batch_size
        self.rows = list(range(batch_size))  # of the last forward pass, and their numbers on the device
        self.row_numbers: Tensor | None = None
        self.attention = on_ragged_attention if takes_ragged_attention(model) else nullcontext

    def _numbers(self, rows: Sequence[int]) -> Tensor | None:
        """The rows on the device, None for all in order; kept, since a block is drafted a token at a time."""
        if list(rows) != self.rows:
            self.rows = list(rows)
            self.row_numbers = None if self.rows == list(range(len(self.lengths))) else on_device(rows, self.device)
        return self.row_numbers

    def _forward(self, rows: Sequence[int], token_ids: Tensor, logits_to_keep: int = 0) -> Tensor:
        """Feed (b, q) tokens to the given rows; (b, q, V) logits over the shared vocabulary."""
        longest = max(self.lengths[row] for row in rows)
        with self.attention(self.model):
            inputs = self.cache.prepare(token_ids.shape[1], rows=self._numbers(rows), max_length=longest)
            logits = self.model(input_ids=token_ids, logits_to_keep=logits_to_keep, **inputs).logits
        for row in rows:
            self.lengths[row] += token_ids.shape[1]
        return logits[..., : self.vocab_size]

    def rollback(self, lengths: dict[int, int]) -> None:
        """Keep only the first ``lengths[row]`` tokens of each row named; no key or value moves."""
        for row, length in lengths.items():
            self.lengths[row] = length
        new_lengths = on_device(self.lengths, self.device)
        mk.truncate_kv_cache_(self.cache, new_lengths, tail="keep", max_length=max(self.lengths))

    def start(self, prompts: dict[int, list[int]]) -> None:
        """Let rows begin with new prompts: cached but for their last token."""
        self.rollback(dict.fromkeys(prompts, 0))
        self._feed({row: ids[:-1] for row, ids in prompts.items()})

    def catch_up(self, texts: dict[int, list[int]], block_size: int) -> None:
        """Read on where another wrote: texts of rows, cached but for their last token. Some tokens at a time, for
        padding needs room in the cache."""
        unread = {row: ids[self.lengths[row] : -1] for row, ids in texts.items()}
        while unread:
            self._feed({row: ids[:block_size] for row, ids in unread.items()})
            unread = {row: ids[block_size:] for row, ids in unread.items() if len(ids) > block_size}

    def _feed(self, texts: dict[int, list[int]]) -> None:
        """Append tokens to rows, a text of its own length each."""
        longest = max(map(len, texts.values()))
        if longest == 0:
            return
        padded = [ids + [0] * (longest - len(ids)) for ids in texts.values()]
        lengths = {row: self.lengths[row] + len(ids) for row, ids in texts.items()}
        # Padding lies behind a row's own tokens, where a causal mask lets none of them look.
        self._forward(list(texts), on_device(padded, self.device), logits_to_keep=1)
        self.rollback(lengths)

    def draft(self, rows: Sequence[int], pending: Tensor, count: int, choose: Choose) -> tuple[Tensor, Tensor]:
        """Write ``count`` tokens a row after the (b,) pending ones; (b, count) ids and their (b, count, V) logits."""
        tokens, logits = [], []
        for offset in range(count):
            logits.append(self._forward(rows, pending[:, None])[:, 0])
            pending = choose(logits[-1], offset)
            tokens.append(pending)
        return torch.stack(tokens, 1), torch.stack(logits, 1)

    def score(self, rows: Sequence[int], pending: Tensor, token_ids: Tensor) -> Tensor:
        """The (b, T, V) logits with which this model would have written (b, T) tokens: one forward pass."""
        return self._forward(rows, torch.cat([pending[:, None], token_ids[:, :-1]], 1))

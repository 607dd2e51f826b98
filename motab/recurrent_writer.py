"""A writer whose model keeps recurrent or convolutional states beside keys and values, as Qwen3.5 or Granite 4 do.

A state cannot be cut to any length: of a row that a rollback cuts, the cache keeps what it held at the last rollback,
at the last one before the step in progress, or nothing. The engine lets the model read the rest again before it next
writes or judges there (`Writer.catch_up`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import motab_kernels as mk
from motab import memory
from motab.writer import PREFILL, Writer
from motab_kernels.model_attention import as_it_generates
from motab_kernels.tensors import on_device

#: Of the logits' standard deviation, how much they may change (root mean square) where a text is read in parts.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}


class RecurrentWriter(Writer):
    """A `Writer` that feeds no padding, since a state would sum it up with the text.

    Attributes:
        settled, anchored: by row, the lengths that the cache can go back to.

    Raises:
        ValueError: the model does not go on from its states where it reads several tokens, or not from zeros as if
            there were none.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, *sizes: Any):
        super().__init__(model, batch_size, *sizes)
        self.settled, self.anchored = [0] * batch_size, [0] * batch_size
        _check_states(model, self.options)

    def rollback(self, lengths: dict[int, int], safe: dict[int, int] | None = None) -> None:
        """Keep at most the first ``lengths[row]`` tokens of each row named: all, those at the last rollback, those at
        the last one that were safe, or none."""
        if safe is not None:
            assert self.cache.states is not None
            positions = [safe.get(row, -1) for row in range(len(self.lengths))]
            self.cache.states.anchor_(on_device(positions, self.device))
            pairs = zip(positions, self.settled, self.anchored, strict=True)
            self.anchored = [new if new <= position else old for position, new, old in pairs]

        def kept(row: int, length: int) -> int:
            if length == self.lengths[row]:
                return length
            return next((n for n in (self.settled[row], self.anchored[row]) if n <= length), 0)

        super().rollback({row: kept(row, length) for row, length in lengths.items()})
        self.settled = list(self.lengths)
        self.anchored = [anchor if length else 0 for anchor, length in zip(self.anchored, self.lengths, strict=True)]

    def catch_up(self, texts: dict[int, list[int]], width: int) -> None:
        """Read what another model wrote, or what a rollback cut: cache all but the last token of these texts.

        Powers of two of tokens at a time, so that rows are read together without padding, for which `width` is.
        """
        unread = {row: ids[:-1] for row, ids in texts.items() if len(ids) > 1}
        while unread:
            size = min(PREFILL, 1 << (max(map(len, unread.values())).bit_length() - 1))
            rows = sorted(row for row, ids in unread.items() if len(ids) >= size)[: PREFILL // size]
            self._feed({row: unread[row][:size] for row in rows})
            unread = {row: ids[size:] if row in rows else ids for row, ids in unread.items()}
            unread = {row: ids for row, ids in unread.items() if ids}


@torch.no_grad()
def _check_states(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Compare a text that is read as a whole with the same in parts: some kernels begin anew with each part of several
    tokens. States of zeros, which a row has that begins beside others, must be as good as none."""
    ids = torch.arange(12, device=model.device)[None] % model.config.get_text_config().vocab_size
    cache = mk.RaggedKVCache(model.config, 1, 12, device=model.device, dtype=memory.cache_dtype(model))

    def read(*parts: Tensor) -> Tensor:
        cache.reset()  # to zeros, before the second text
        return torch.cat([model(x, **options, **cache.prepare(x.shape[1])).logits.float() for x in parts], 1)

    with as_it_generates(model):
        whole, in_parts = read(ids), read(*ids.split([7, 5], 1))
    # Not the largest: in low precision a router may choose other experts for a token.
    change, spread = float((whole - in_parts).square().mean().sqrt()), float(whole.std())
    # Logits that are not finite are refused where they are drawn from.
    if whole.isfinite().all() and not change <= TOLERANCE[memory.cache_dtype(model)] * spread:
        raise ValueError(
            "a model with recurrent states must begin with zeros, and go on from them where it reads several tokens, "
            f"got {type(model).__name__}, whose logits change by {change:.3g} (root mean square; standard deviation "
            f"{spread:.3g}) if a text is read in parts; another implementation of its layers may do so (transformers "
            "names the packages)"
        )

"""A writer whose model is compiled: without it, a small model on a GPU waits for Python between its kernels.

`torch.compile` with dynamic shapes makes one program for one token per row and one for a block, for any number of rows
and any length. On a GPU each runs as a CUDA graph, which is recorded again for each new shape. To need few graphs, a
pass feeds a power of two of rows, one token or a whole block each, and sees a power of two of slots. The padding lies
after a row's own tokens, and the rollback at the end of the round removes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from motab.memory import Pages
from motab.writer import Writer
from motab_kernels.model_attention import ForwardPass, takes_ragged_attention
from motab_kernels.ragged_kv_cache_checks import keeps_states

LEAST_SLOTS = 256  # slots that a pass sees, at least


def power_of_two(number: int) -> int:
    """The smallest power of two >= `number`."""
    return 1 << (number - 1).bit_length()


class CompiledWriter(Writer):
    """A `Writer` that drafts and scores blocks of up to `block_size` tokens with a compiled model.

    Raises:
        ValueError: the model does not run on `ragged_attention`, and its masks would change shape with each token; or
            it keeps recurrent states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        max_length: int,
        vocab_size: int,
        pages: Pages | None,
        block_size: int,
    ):
        if keeps_states(model.config):
            raise ValueError(
                f"torch_compile: expected a model with keys and values alone, got {type(model).__name__}, which keeps "
                "recurrent states, of which padding would become a part; leave torch_compile off"
            )
        if not takes_ragged_attention(model):
            raise ValueError(
                f"torch_compile: expected a model that runs on ragged_attention, got {type(model).__name__} with "
                f'attention "{model.config.get_text_config(decoder=True)._attn_implementation}" in {model.dtype}; load '
                "it with another attn_implementation or dtype, or leave torch_compile off"
            )
        # A size of one would be compiled as a program of its own.
        super().__init__(model, max(2, batch_size), max_length, vocab_size, pages)
        self.block_size = block_size
        own = model.generation_config.compile_config if model.generation_config is not None else None
        self.compiled = model.get_compiled_call(own or CompileConfig(fullgraph=True, dynamic=True))
        self.all_rows = torch.arange(len(self.lengths), device=self.device)
        self.reserve({0: 1})
        with torch.no_grad():
            self._feed({0: [0]})  # allocates keys and values
            self.rollback({0: 0})
        _vary(self.cache.lengths, 0)
        for layer in self.cache.layers:
            for storage in (layer.keys, layer.values):
                _vary(storage, 0, 2)

    def _numbers(self, rows: Sequence[int]) -> Tensor:
        numbers = super()._numbers(rows)
        return self.all_rows if numbers is None else numbers  # "all" would be a program of its own

    def _advance(self, rows: Sequence[int], token_ids: Tensor) -> Tensor:
        b, q = token_ids.shape
        width = 1 if q == 1 else self.block_size
        count = min(len(self.lengths), max(2, power_of_two(b)))
        idle = [row for row in range(len(self.lengths)) if row not in rows]
        padded = token_ids.new_zeros(count, width)
        padded[:b, :q] = token_ids
        # self.lengths leaves out what a draft has fed to idle rows, up to a block.
        reach = max(self.lengths) + self.block_size
        visible = min(max(LEAST_SLOTS, power_of_two(reach)), self.cache.max_length)
        logits = self._forward(self._run, [*rows, *idle[: count - b]], padded, visible - width)
        self._lengthen(rows, q)
        return logits[:b, :q]

    def _run(self, ragged_step: ForwardPass, **inputs: Any) -> Any:
        assert ragged_step.rows is not None
        for x in (inputs["input_ids"], inputs["position_ids"], ragged_step.slots, ragged_step.places, ragged_step.rows):
            _vary(x, *range(x.dim()))
        torch.compiler.cudagraph_mark_step_begin()
        # A module's float, as the epsilon of a norm, would otherwise be an input on the CPU, to copy at each call.
        with torch._dynamo.config.patch(specialize_float=True):
            return self.compiled(ragged_step=ragged_step, **inputs)


def _vary(x: Tensor, *dims: int) -> None:
    """Tell `torch.compile` that these sizes vary independently; it takes equal sizes for one and the same."""
    for dim in dims:
        if x.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(x, dim)

"""One layer of a `RaggedKVCache`.

B rows of the cache, b rows of one forward pass, H heads, S slots, D head size, q new tokens; P pages.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from motab_kernels.model_attention import ForwardPass
from motab_kernels.page_table import PageTable


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, H, S, D) or (P + 1, H, S, D), allocated when the first ones arrive."""

    is_croppable = True

    def __init__(self, batch_size: int, max_length: int, is_sliding: bool, pages: PageTable | None) -> None:
        super().__init__()
        self.max_length = max_length
        self.is_sliding = is_sliding
        self.pages = pages
        self.pieces, self.slots = (batch_size, max_length) if pages is None else (pages.num_pages + 1, pages.page_size)

    # The cache answers for sizes and positions, which are the same for every layer.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("ask the cache: RaggedKVCache.get_mask_sizes")

    def get_seq_length(self) -> int:
        raise NotImplementedError("ask the cache: RaggedKVCache.get_seq_length")

    def get_max_length(self) -> int:
        return self.max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                at_one_address(
                    torch.zeros(
                        (self.pieces, states.shape[1], self.slots, states.shape[3]),
                        dtype=states.dtype,
                        device=states.device,
                    )
                )
                for states in (key_states, value_states)
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, step: ForwardPass) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states, step), self._write(self.values, value_states, step)

    def _write(self, storage: Tensor, states: Tensor, step: ForwardPass) -> Tensor:
        """Write ``states`` (b, H, q, D) to the step's slots. Return the slots that the step sees, (b, H,
        visible_length, D), or the storage for an attention that finds rows and slots itself."""
        storage.transpose(1, 2)[step.places, step.offsets] = states.transpose(1, 2)
        if step.windows is not None:
            return storage
        if self.pages is not None:
            assert step.page_table is not None
            visible = self.pages.in_one_piece(storage, step.page_table, step.visible_length)
            # A mask leaves 0 times what others wrote there, and that is NaN if they wrote NaN.
            return visible.masked_fill_(self.pages.unwritten(step.page_table, step.slots, step.visible_length), 0)
        visible = storage[:, :, : step.visible_length]
        return visible if step.rows is None else visible.index_select(0, step.rows)


def at_one_address(x: Tensor) -> Tensor:
    """Tell `torch.compile` that a tensor keeps its address: otherwise CUDA graphs do not write to it in place."""
    if x.is_cuda and not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x

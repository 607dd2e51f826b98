"""How long a forward pass takes: estimated and not measured, so that a run can be repeated exactly."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from motab.memory import cache_bytes
from motab.models import processes_sharing


class Machine(NamedTuple):
    """What sets a pass's pace: seconds for Python to launch a layer, bytes and floating-point operations a second."""

    layer: float
    bandwidth: float
    arithmetic: float


#: Rounded from a fit to 44 passes of models of 0.4 to 92 million parameters over 1 to 512 tokens, on a thread with
#: AVX-512: it gives 38 of them within a factor of 1.7, and the worst at half its time.
CPU = Machine(5e-4, 1.3e10, 1.2e11)
#: An H100 with weights of 16 bits, from its data sheet.
GPU = Machine(5e-4, 3e12, 5e14)


class Weights(NamedTuple):
    """Number and bytes of the weights that each token uses, or of all experts."""

    number: float
    bytes: float


class PassTime:
    """Estimated seconds of a model's forward passes.

    A pass launches its layers, reads the weights and the keys and values of all cached tokens, and multiplies each
    token by the weights. These times add up on a CPU; on a GPU they overlap, and the longest counts. Of a mixture of
    experts it reads those that the tokens choose, as if by chance, and multiplies by those of each token.

    Args:
        model: its device says which machine; one that processes share counts for its part.
        block_size: of a compiled model, which launches nothing layer by layer, and for more than a token a row always
            reads a block; None: not compiled.
    """

    def __init__(self, model: PreTrainedModel, block_size: int | None = None):
        config = model.config.get_text_config(decoder=True)
        self.machine, self.block_size = CPU if model.device.type == "cpu" else GPU, block_size
        self.layers = 0 if block_size is not None else int(config.num_hidden_layers)
        self.dense, self.experts, self.chosen = _weights(model, config)
        self.cached_bytes = cache_bytes(model).of_token  # in this process
        self.parts = processes_sharing(model)

    def __call__(self, rows: int, width: int, cached: float) -> float:
        if self.block_size is not None and width > 1:
            width = self.block_size
        tokens = rows * width
        read = self.dense.bytes + self.experts.bytes * (1 - (1 - self.chosen) ** tokens)
        multiplied = 2 * tokens * (self.dense.number + self.chosen * self.experts.number)
        times = (
            self.layers * self.machine.layer,
            (read / self.parts + rows * cached * self.cached_bytes) / self.machine.bandwidth,
            multiplied / self.parts / self.machine.arithmetic,
        )
        return sum(times) if self.machine is CPU else max(times)


def _weights(model: PreTrainedModel, config: PretrainedConfig) -> tuple[Weights, Weights, float]:
    """Of what each token uses, of all experts, and the share of the experts that a token chooses."""
    experts = [p for p in model.parameters() if p.dim() == 3]  # as transformers keeps them
    per_token = getattr(config, "num_experts_per_tok", None)
    chosen = min(1.0, per_token / len(experts[0])) if experts and per_token else 1.0
    # Of weights in few bits several may be packed into a number, and some kinds are buffers.
    total = Weights(model.num_parameters(), model.get_memory_footprint())
    of_experts = Weights(sum(p.numel() for p in experts), sum(p.nbytes for p in experts))
    return Weights(*(a - b for a, b in zip(total, of_experts, strict=True))), of_experts, chosen

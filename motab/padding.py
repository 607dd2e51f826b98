"""Batches without padding: all rows in one sequence, where a model tells them apart by their positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from motab.dataset import IGNORED

_ROWS = ((0, 1), (1, 1, 0), (1, 0, 0, 1))


def without_padding(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `motab.collate` returns, (B, T), as one row of all tokens, (1, N), with their `position_ids`. No row's first
    token is predicted, since what is before it is another's."""
    kept = inputs["attention_mask"].nonzero(as_tuple=True)  # the host waits for a GPU: once for all
    labels = inputs["labels"].clone()
    labels[:, 0] = IGNORED
    positions = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    rows = {"input_ids": inputs["input_ids"], "position_ids": positions, "labels": labels}
    return {name: x[kept][None] for name, x in rows.items()}


@torch.no_grad()
def reads_rows_apart(model: PreTrainedModel) -> bool:
    """Whether rows in one sequence give the logits that each gives alone, tested on three."""

    def logits(*rows: Sequence[int]) -> Tensor:
        tokens, positions = zip(*(pair for row in rows for pair in zip(row, range(len(row)), strict=True)), strict=True)
        ids, position_ids = (torch.tensor([numbers], device=model.device) for numbers in (tokens, positions))
        return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[0]

    first, second, last = _ROWS
    was_training = model.training
    model.eval()
    alone, together = torch.cat([logits(row) for row in _ROWS]), logits(first, second, last)
    swapped = logits(second, first, last)
    model.train(was_training)
    # But for rounding as in another batch, which in low precision hides what a row sees of the others: that, a swap of
    # the others shows to the last bit, since the batch holds the same rows and the last has kept its place.
    is_near = (together - alone).norm() <= torch.finfo(alone.dtype).eps ** 0.5 * alone.norm()
    return bool(is_near) and torch.equal(together[-len(last) :], swapped[-len(last) :])

"""The divergence of a student from its teacher over the tokens of a batch, for the trainer.

B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import motab_kernels as mk


class Divergence(NamedTuple):
    """What `motab_kernels.divergence_loss` calls a divergence, with its settings."""

    divergence: str
    beta: float
    alpha: float
    temperature: float


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its last hidden states times its output embeddings, and nothing more: asked of the
    model itself, by two tokens."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:  # an adapter's is more than its weight
        return False
    was_training = model.training
    with torch.no_grad():
        outputs = model.eval()(torch.tensor([[0, 1]], device=model.device), output_hidden_states=True)
        model.train(was_training)
        # To the last bit: of small logits a softcap takes next to nothing.
        return torch.equal(head(outputs.hidden_states[-1]).float(), outputs.logits.float())


def loss_from_heads(
    models: tuple[PreTrainedModel, PreTrainedModel],
    outputs: tuple[Any, Any],
    mask: Tensor,
    settings: Divergence,
    num_items: int | Tensor | None,
) -> Tensor:
    """From hidden states and output embeddings: logits exist for some positions at a time."""
    heads = [model.get_output_embeddings() for model in models]
    student, teacher = (x.hidden_states[-1][:, :-1] for x in outputs)
    return mk.fused_linear_divergence(
        student,
        heads[0].weight,
        teacher,
        heads[1].weight,
        student_bias=heads[0].bias,
        teacher_bias=heads[1].bias,
        mask=mask,
        num_items=num_items,
        **settings._asdict(),
    )


def loss_from_logits(
    outputs: tuple[Any, Any], mask: Tensor, settings: Divergence, num_items: int | Tensor | None
) -> Tensor:
    """Whatever the heads do. Nobody reads the logits again: the gradient goes over them."""
    student, teacher = (x.logits[:, :-1] for x in outputs)
    return mk.divergence_loss(
        student, teacher, mask=mask, num_items=num_items, inplace_backward=True, **settings._asdict()
    )

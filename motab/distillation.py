"""The trainer's losses over the tokens of a batch: cross-entropy, and the divergence of a student from its teacher.

B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import motab_kernels as mk
from motab.dataset import IGNORED
from motab.sharding import is_linear, whole_head
from motab_kernels.model_attention import on_attention

BUDGET = 1 << 30  # bytes of logits, float32 copies and gradients held at a time


class Divergence(NamedTuple):
    """A divergence and its settings, as `motab_kernels.divergence_loss` names them."""

    divergence: str
    beta: float
    alpha: float
    temperature: float


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are exactly its last hidden states times its output embeddings, tested on two tokens.

    `last_hidden_states` and ``output_hidden_states=True`` must give the same states.
    """
    head = model.get_output_embeddings()
    if not is_linear(head):  # an adapter's head is more than its weight
        return False
    was_training = model.training
    with torch.no_grad():
        token_ids = torch.tensor([[0, 1]], device=model.device)
        outputs = model.eval()(token_ids, output_hidden_states=True)
        with catching_hidden_states(model) as found:
            model(input_ids=token_ids, use_cache=False, logits_to_keep=1)
        model.train(was_training)
        if not found:
            return False
        # Exactly: a softcap changes small logits very little.
        return torch.equal(found[0], outputs.hidden_states[-1]) and torch.equal(
            head(found[0]).float(), outputs.logits.float()
        )


def attention_that_runs(model: Any) -> AbstractContextManager[None]:
    """Until the block ends sdpa takes the place of flash attention on a CPU, where a model is before FSDP shards it."""
    is_flash = "flash" in str(model.config.get_text_config(decoder=True)._attn_implementation)
    return on_attention(model, "sdpa") if is_flash and model.device.type == "cpu" else nullcontext()


@contextmanager
def catching_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """The last hidden states of each forward pass of the model, or of what wraps it. ``output_hidden_states`` would
    keep those of all layers, of which accelerate makes float32 copies in mixed precision. Nothing is found of a model
    that runs a part of its base model alone (OPT), or names another base model than it has (Llama 4)."""
    found: list[Tensor] = []
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # with adapters

    def catch(module: Any, args: Any, output: Any) -> None:
        if "last_hidden_state" in output:
            found.append(output.last_hidden_state)

    hook = inner.base_model.register_forward_hook(catch)
    try:
        yield found
    finally:
        hook.remove()


def last_hidden_states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """(B, T, H), without keeping the states of other layers, keys or values."""
    with catching_hidden_states(model) as found:
        model(**inputs, use_cache=False, logits_to_keep=1)  # the whole model, as sharded weights need
    return found[0]


def output_and_loss(
    model: Any,
    bare: Any,
    inputs: dict[str, Any],
    loss_from: Callable[[Tensor], Tensor],
    *,
    in_head: bool = False,
    from_output: bool = False,
) -> tuple[Any, Tensor]:
    """The output of a model, or of what wraps it, and the loss from its last hidden states.

    ``in_head``: for DeepSpeed, which has the head's weights whole within the head's own forward pass, and whose
    backward pass begins at the model's output: the loss is taken there, and returned in place of logits.
    ``from_output``: for what sees no hidden states but those that the model returns.
    """
    if in_head:
        with _head_returning(bare, loss_from):
            output = model(**inputs)
        return output, output.logits.squeeze()
    if from_output:
        output = model(**inputs, output_hidden_states=True, logits_to_keep=1)
        hidden = output.hidden_states[-1]
    else:
        with catching_hidden_states(bare) as found:
            output = model(**inputs, logits_to_keep=1)
        hidden = found[0]
    loss = loss_from(hidden)
    if not hidden.requires_grad and output.logits.requires_grad:
        loss = loss + 0 * output.logits.sum()  # only the head is trained: FSDP2 looks at outputs with a gradient
    return output, loss


@contextmanager
def _head_returning(model: Any, loss_from: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the output embeddings return the loss, as logits of one token and a vocabulary of one."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden: loss_from(hidden).view(1, 1, 1)
    try:
        yield
    finally:
        del head.forward


def cross_entropy_from_head(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    num_items: int | Tensor | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of (B, T) labels, each predicted by the (B, T, H) hidden states before it: the sum over
    ``num_items`` (0 counts as 1), or the mean. Logits exist for some positions at a time, and are computed again for
    the gradient."""
    head = whole_head(model)
    counted = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # the host waits for a GPU: once for both
    hidden, labels = hidden[:, :-1][counted], labels[:, 1:][counted]  # no logits of prompts and padding

    def part(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = linear(hidden, head.weight, head.bias).float()
        return cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)

    # Logits, their float32, and the gradients of both.
    size = max(1, BUDGET // (len(head.weight) * (8 + 2 * head.weight.element_size())))
    pairs = zip(hidden.split(size), labels.split(size), strict=True)
    total = torch.stack([checkpoint(part, *pair, use_reentrant=False) for pair in pairs]).sum()
    return total / torch.as_tensor(len(labels) if num_items is None else num_items).clamp(min=1)


def loss_from_heads(
    models: tuple[PreTrainedModel, PreTrainedModel],
    hidden: tuple[Tensor, Tensor],
    mask: Tensor,
    settings: Divergence,
    num_items: int | Tensor | None,
) -> Tensor:
    """The divergence from (B, T, H) hidden states and output embeddings; logits exist for some positions at a time."""
    heads = [whole_head(model) for model in models]
    counted = mask.nonzero(as_tuple=True)  # the host waits for a GPU: once for both
    student, teacher = (x[:, :-1][counted] for x in hidden)  # no logits of prompts and padding
    return mk.fused_linear_divergence(
        student,
        heads[0].weight,
        teacher,
        heads[1].weight,
        student_bias=heads[0].bias,
        teacher_bias=heads[1].bias,
        num_items=num_items,
        **settings._asdict(),
    )


def loss_from_logits(
    logits: tuple[Tensor, Tensor], mask: Tensor, settings: Divergence, num_items: int | Tensor | None
) -> Tensor:
    """The divergence from (B, T, V) logits, for any head; the gradient overwrites the logits."""
    student, teacher = (x[:, :-1] for x in logits)
    return mk.divergence_loss(
        student, teacher, mask=mask, num_items=num_items, inplace_backward=True, **settings._asdict()
    )

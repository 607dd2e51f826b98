"""`fused_linear_divergence`: a divergence from hidden states and language-model heads, without whole logits.

N positions, H and H_t hidden sizes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from motab_kernels.arguments import check_count, shared_columns
from motab_kernels.backend import choose_backend
from motab_kernels.divergence_checks import (
    check_finite_gradient,
    check_heads,
    check_whole_heads,
    divisor,
    refuse_second_derivative,
    refuse_transforms,
    resolve,
    temperature_tensor,
)
from motab_kernels.divergence_kernels import weighted
from motab_kernels.divergence_sums import by_position
from motab_kernels.linear_head import CHUNKS, SLICE, Head, HeadDivergence, as_autocast, chunk_size_for, without_autocast
from motab_kernels.tensors import as_normal, is_batched, wide_dtype
from motab_kernels.vocab_parallel import add_ranks_, columns_here, kernels_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["fused_linear_divergence"]

#: A float16 gradient by the logits is multiplied by this over the largest position's scale, so that it neither vanishes
#: nor overflows. The factor is removed when gradients are passed on.
HEADROOM = 256.0


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    check_finite: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`divergence_loss` of two language-model heads, differentiable by the student's hidden states, weight and bias.

    Equivalent to::

        def logits(hidden, weight, bias, scale, softcap):
            x = scale * torch.nn.functional.linear(hidden, weight, bias)
            return x if softcap is None else softcap * torch.tanh(x / softcap)

        divergence_loss(logits(student_hidden, ...), logits(teacher_hidden, ...), divergence=divergence, ...)

    but over `chunk_size` positions at a time, and with logits in float32 (float64 for float64) whatever the dtype of
    the hidden states. A loss that is reduced to a number computes its gradients in the forward pass, so that each
    matrix product is done once; "none" computes the logits again in the backward pass, because only there the upstream
    gradient of each position is known. The gradient by the logits is rounded to the hidden states' dtype, once. The
    weight's gradient is summed in the weight's own dtype over five chunks at a time, except for float16: it is summed
    in float32, so that nothing is lost to its narrow range before the upstream gradient, as from a GradScaler, is
    applied. Differentiable once, by backward(): second derivatives, and those of `torch.func`, are refused. A reduced
    loss hands its gradients out in place: a second backward pass (``retain_graph=True``) raises.

    Args:
        student_hidden, teacher_hidden: (B, H) or (B, T, H), each with its own H; the dtype of their weight. Under
            autocast all are taken in its dtype.
        student_weight, teacher_weight: (V_student, H) and (V_teacher, H). If `student_weight` does not require a
            gradient (a frozen head), none is computed. May be tied to an embedding.
        student_bias, teacher_bias: (V_student,) and (V_teacher,).
        student_logit_scale, teacher_logit_scale: multiply the logits.
        student_softcap, teacher_softcap: > 0, as Gemma 2 caps its logits; after the scale.
        chunk_size: how many positions' logits exist at a time, of both sides, besides the student's gradient at five
            times this number. None: as many as fit into 1 GiB. No other memory is needed beyond inputs and gradients.
        divergence, beta, alpha, temperature, mask, weights, reduction, num_items, vocab_size, check_finite, backend:
            see `divergence_loss`. Positions that the mask leaves out take the same matrix products: where they are
            many, pass the hidden states of the others alone, ``hidden[mask]``, for which the host waits.
        group: see `divergence_loss`; each rank has all the hidden states, and the same slice of both heads' weight and
            bias. The gradients of weight and bias are the slice's. That of the hidden states is complete on each rank,
            and must not be summed over the ranks again. Its parts, in the hidden states' dtype as in a column-parallel
            linear layer, are added in float32 (float64): one all-reduce for five chunks, besides the all-gathers, where
            the gradients are computed. For "none" each rank must pass back the same upstream gradient. Slices of
            different width need a `chunk_size`.

    Returns:
        As `divergence_loss`.

    Raises:
        ValueError: as in `divergence_loss`; hidden states or a bias that do not fit their weight; a chunk size that
            differs between ranks.

    Source: the losses are those of `divergence_loss`; gradients within the forward pass, as in Liger Kernel's fused
    linear cross-entropy (arXiv 2410.10989).
    """
    kind, lam = resolve(divergence, beta, alpha)
    check_whole_heads((student_hidden, student_weight, student_bias), (teacher_hidden, teacher_weight, teacher_bias))
    refuse_transforms("fused_linear_divergence", student_hidden, student_weight, student_bias)
    student_hidden, student_weight, student_bias = as_autocast(student_hidden, student_weight, student_bias)
    teacher_hidden, teacher_weight, teacher_bias = as_autocast(teacher_hidden, teacher_weight, teacher_bias)
    heads = (student_hidden, student_weight, student_bias), (teacher_hidden, teacher_weight, teacher_bias)
    scales, softcaps = (student_logit_scale, teacher_logit_scale), (student_softcap, teacher_softcap)
    check_heads(*heads, scales, softcaps, mask, weights)
    leading = student_hidden.shape[:-1]
    N = leading.numel()
    V = shared_columns(student_weight.shape[0], teacher_weight.shape[0], vocab_size)
    backend = choose_backend(backend, student_hidden, teacher_hidden)
    tau = temperature_tensor(temperature, leading[0], student_hidden.device)
    if tau is not None:
        tau = by_position(tau, leading[1:].numel())
    keep = None if mask is None else as_normal(mask).reshape(-1).contiguous()
    if chunk_size is None:
        chunk_size = chunk_size_for(student_weight, teacher_weight)
    check_count("chunk_size", chunk_size)
    if group is not None:
        widths = student_weight.shape[0], teacher_weight.shape[0]
        V = columns_here(group, *widths, vocab_size, student_hidden.device, chunk_size)

    tensors = (student_hidden.reshape(N, student_hidden.shape[-1]), student_weight, student_bias)
    bias = None if teacher_bias is None else as_normal(teacher_bias.detach())
    teacher_hidden = as_normal(teacher_hidden.detach())
    others = (teacher_hidden.reshape(N, teacher_hidden.shape[-1]), as_normal(teacher_weight.detach()), bias)
    factors = [student_logit_scale, student_softcap or 0.0], [teacher_logit_scale, teacher_softcap or 0.0]
    name = "" if group is None else group.group_name
    options = (*factors, kind, lam, V, min(chunk_size, max(1, N)), check_finite, backend, name)
    if reduction == "none":
        divisor(reduction, num_items, mask, student_hidden)
        loss = positions_op(*tensors, *others, keep, tau, *options)
        loss = loss.view(leading)
        return loss if weights is None else weighted(loss, weights, mask)
    scale = torch.ones(N, dtype=wide_dtype(student_hidden), device=student_hidden.device)
    if weights is not None:
        scale = scale * weights.detach().reshape(-1)
    scale = scale / divisor(reduction, num_items, mask, student_hidden)
    # Of a tensor under vmap the flag does not show.
    needs = [x is not None and (x.requires_grad or is_batched(x)) for x in heads[0]]
    needs_grad = [torch.is_grad_enabled() and need for need in needs]
    return total_op(*tensors, *others, keep, tau, scale, needs_grad, *options)[0]


#: Both ops take the same tensors first: hidden, weight and bias of the student and of the teacher, keep and tau.
TENSORS = 8

#: What `total_op` returns.
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("motab_kernels::linear_divergence_positions", mutates_args=())
def positions_op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    tau: Tensor | None,
    student_scales: list[float],
    teacher_scales: list[float],
    kind: str,
    lam: float,
    vocab_size: int,
    chunk_size: int,
    check_finite: bool,
    backend: str,
    group: str = "",
) -> Tensor:
    """Each position's loss, (N,). A side's scales are its logits' factor and softcap, 0 for none."""
    student = Head(student_hidden, student_weight, student_bias, *student_scales)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, *teacher_scales)
    kernels = kernels_of(backend, student_hidden.device, group)
    heads = HeadDivergence(student, teacher, keep, tau, kind, lam, vocab_size, kernels)
    return _losses(heads, chunk_size)


@positions_op.register_fake
def _(student_hidden: Tensor, *args: object) -> Tensor:
    return student_hidden.new_empty(student_hidden.shape[0], dtype=wide_dtype(student_hidden))


@torch.library.custom_op("motab_kernels::linear_divergence", mutates_args=())
def total_op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    tau: Tensor | None,
    scale: Tensor,
    needs_grad: list[bool],
    student_scales: list[float],
    teacher_scales: list[float],
    kind: str,
    lam: float,
    vocab_size: int,
    chunk_size: int,
    check_finite: bool,
    backend: str,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sum of scale * loss; its gradients by hidden, weight and bias, each empty where it is not needed; and the unit
    that these are in, 1 except for float16: the reciprocal of what AMP calls a loss scale."""
    student = Head(student_hidden, student_weight, student_bias, *student_scales)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, *teacher_scales)
    kernels = kernels_of(backend, student_hidden.device, group)
    heads = HeadDivergence(student, teacher, keep, tau, kind, lam, vocab_size, kernels)
    return _total(heads, scale, needs_grad, chunk_size, check_finite, group)


@total_op.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _, needs_grad, *_ = args[TENSORS - 2 :]
    return _empty_results(student_hidden, student_weight, needs_grad)


def _losses(heads: HeadDivergence, chunk_size: int) -> Tensor:
    """Each position's loss, (N,)."""
    hidden = heads.student.hidden
    loss = torch.empty(len(hidden), dtype=wide_dtype(hidden), device=hidden.device)
    for part in _parts(slice(0, len(loss)), chunk_size):
        _, _, loss[part], _ = heads.forward(part)
    return loss


def _total(
    heads: HeadDivergence, scale: Tensor, needs_grad: list[bool], chunk_size: int, check_finite: bool, group: str
) -> Results:
    """The op in a loop over blocks of positions, and over chunks of a block."""
    hidden, weight = heads.student.hidden, heads.student.weight
    N, of_hidden, of_weight, of_bias = len(hidden), *needs_grad
    total, grad_hidden, grad_weight, grad_bias, unit = _empty_results(hidden, weight, needs_grad)
    losses = torch.empty(N, dtype=total.dtype, device=hidden.device)
    grad_bias.zero_()
    unit.fill_(1)
    is_narrow = hidden.dtype == torch.float16  # which does not hold sums over many positions
    if is_narrow or N == 0:
        grad_weight.zero_()
    scale = scale.to(total.dtype)
    if heads.keep is not None:
        scale = scale.masked_fill(~heads.keep, 0)
    if is_narrow and N:
        largest = scale.abs().amax()
        unit.copy_(torch.where(largest > 0, largest / HEADROOM, 1))
    in_units = scale / unit
    memory = weight.new_empty(min(N, chunk_size * CHUNKS) if any(needs_grad) else 0, len(weight))
    for block in _parts(slice(0, N), chunk_size * CHUNKS):
        out = memory[: block.stop - block.start]
        for part in _parts(block, chunk_size):
            s, t, losses[part], saved = heads.forward(part)
            if any(needs_grad):
                here = out[part.start - block.start : part.stop - block.start]
                heads.write_gradient(part, s, t, saved, in_units[part], here)
                if check_finite:
                    check_finite_gradient(here, group, part.start)
            del s, t, saved  # before the next ones are made
        if of_hidden:
            torch.mm(out, weight, out=grad_hidden[block])
            if group:
                add_ranks_(grad_hidden[block], group)
        if of_weight:
            # Hidden states that do not count may be NaN.
            counted = hidden[block].masked_fill((scale[block] == 0)[:, None], 0)
            if is_narrow:
                product = torch.addmm(out.new_zeros(1), out.T, counted, beta=0, alpha=1 / HEADROOM)
                grad_weight.add_(product, alpha=HEADROOM)
            else:  # the first block's product is written, which saves a pass over the gradient
                grad_weight.addmm_(out.T, counted, beta=0 if block.start == 0 else 1)
        if of_bias:
            grad_bias += out.sum(0, dtype=total.dtype)
    total.copy_(weighted(losses, scale).sum())  # once: between two products each small kernel costs a GPU its pause
    return total, grad_hidden, grad_weight, grad_bias, unit


def _empty_results(hidden: Tensor, weight: Tensor, needs_grad: list[bool]) -> Results:
    dtype = wide_dtype(hidden)
    of_weight = dtype if weight.dtype == torch.float16 else weight.dtype
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape if needs_grad[0] else 0),
        weight.new_empty(weight.shape if needs_grad[1] else 0, dtype=of_weight),
        hidden.new_empty(weight.shape[0] if needs_grad[2] else 0, dtype=dtype),
        hidden.new_empty((), dtype=dtype),
    )


def _parts(whole: slice, size: int) -> Iterator[slice]:
    for start in range(whole.start, whole.stop, size):
        yield slice(start, min(start + size, whole.stop))


def _setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, *_ = inputs
    ctx.dtype = weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_total(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("fused_linear_divergence")
    if getattr(ctx, "is_handed_out", False) and not torch.compiler.is_compiling():
        raise ValueError(
            "fused_linear_divergence: expected one backward pass, which hands out the gradients in place, got another "
            'one; call the op again, or take the sum of reduction="none"'
        )
    in_place = not (torch.compiler.is_compiling() or is_batched(upstream))
    ctx.is_handed_out = in_place
    *gradients, unit = ctx.saved_tensors
    return _scaled(gradients, ctx.needs_input_grad, upstream * unit, ctx.dtype, in_place)


def _setup_positions(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]


def _backward_positions(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("fused_linear_divergence")
    needs_grad = list(ctx.needs_input_grad[:3])
    tensors = ctx.saved_tensors  # once: checkpoints compute them for one look only
    with without_autocast(upstream.device):  # whatever the backward pass runs under
        _, *gradients, unit = total_op(*tensors, upstream.contiguous(), needs_grad, *ctx.options)
    _, weight, *_ = tensors
    factor = unit if weight.dtype == torch.float16 else None
    return _scaled(gradients, ctx.needs_input_grad, factor, weight.dtype, in_place=False)


def _scaled(
    gradients: Sequence[Tensor], needs: Sequence[bool], factor: Tensor | None, dtype: torch.dtype, in_place: bool
) -> tuple[Tensor | None, ...]:
    """The gradients times the factor, rounded to the dtype; None for each input of the op that needs none."""

    def scaled(x: Tensor) -> Tensor:
        if factor is None:
            return x.to(dtype)
        # With a dimension the factor, which may be larger than float16 holds, is not rounded to the gradient's dtype.
        wide = factor.reshape(1)
        if not in_place:
            return (x * wide).to(dtype)
        for part in x.split(SLICE):  # because a weight's gradient is large, and a CPU makes wide copies
            part.mul_(wide)
        return x.to(dtype)

    needed = [scaled(x) if need else None for x, need in zip(gradients, needs[: len(gradients)], strict=True)]
    return (*needed, *(None,) * (len(needs) - len(needed)))


total_op.register_autograd(_backward_total, setup_context=_setup_total)
positions_op.register_autograd(_backward_positions, setup_context=_setup_positions)

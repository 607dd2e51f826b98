"""`fused_linear_divergence`: a divergence from hidden states and language-model heads, without whole logits.

N positions, H and H_t hidden sizes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from motab_kernels.arguments import check_count, shared_columns
from motab_kernels.backend import choose_backend
from motab_kernels.divergence_checks import (
    check_finite_gradient,
    check_heads,
    divisor,
    refuse_forward_mode,
    refuse_second_derivative,
    resolve,
    temperature_tensor,
)
from motab_kernels.divergence_kernels import DivergenceKernels, divergence_forward, kernels_of, weighted
from motab_kernels.divergence_sums import by_position
from motab_kernels.linear_head import CHUNKS, Head, autocast, chunk_size_for
from motab_kernels.tensors import as_normal, wide_dtype
from motab_kernels.vocab_parallel import add_ranks_, columns_here

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
    applied. Differentiable once, by backward(): second derivatives and forward-mode derivatives are refused. A reduced
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
            see `divergence_loss`.
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
    refuse_forward_mode("fused_linear_divergence", student_hidden, student_weight, student_bias)
    student_hidden, student_weight, student_bias = autocast(student_hidden, student_weight, student_bias)
    teacher_hidden, teacher_weight, teacher_bias = autocast(teacher_hidden, teacher_weight, teacher_bias)
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
        chunk_size = chunk_size_for(student_weight, teacher_weight, student_softcap is not None)
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
        loss = rows_op(*tensors, *others, keep, tau, *options)
        loss = loss.view(leading)
        return loss if weights is None else weighted(loss, weights, mask)
    scale = torch.ones(N, dtype=wide_dtype(student_hidden), device=student_hidden.device)
    if weights is not None:
        scale = scale * weights.detach().reshape(-1)
    scale = scale / divisor(reduction, num_items, mask, student_hidden)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads[0]]
    return total_op(*tensors, *others, keep, tau, scale, needs, *options)[0]


class _Heads(NamedTuple):
    """Both sides' heads, and the divergence between them."""

    student: Head
    teacher: Head
    keep: Tensor | None  # (N,)
    tau: Tensor | None  # 0-d or (N,)
    kind: str
    lam: float
    vocab_size: int
    kernels: DivergenceKernels

    def forward(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both sides' logits (n, V) at some positions, their losses, and what the gradient needs besides."""
        s, t = self.student.logits(part), self.teacher.logits(part)
        keep = None if self.keep is None else self.keep[part]
        shared = self._shared(s), self._shared(t)
        return s, t, *divergence_forward(self.kernels, *shared, self._tau(part), keep, self.kind, self.lam)

    def write_gradient(self, part: slice, s: Tensor, t: Tensor, saved: Tensor, worth: Tensor, out: Tensor) -> None:
        """The gradient by the head's matrix product, rounded once to the dtype of `out` (n, V)."""
        scale, softcap = self.student.scale, self.student.softcap
        target = torch.empty_like(s) if softcap else out
        shared = self._shared(s), self._shared(t)
        self.kernels.divergence_gradient(
            *shared, self._tau(part), saved, worth * scale, self.kind, self.lam, self._shared(target)
        )
        if softcap:
            target.mul_(1 - (s / softcap).square_())
            out.copy_(target.masked_fill_((worth == 0)[:, None], 0))  # logits that do not count may be NaN
        out[:, self.vocab_size :] = 0

    def _shared(self, x: Tensor) -> Tensor:
        """(n, V) as (B, T, V) with T = 1, of the columns that count."""
        return x[:, None, : self.vocab_size]

    def _tau(self, part: slice) -> Tensor | None:
        return self.tau if self.tau is None or self.tau.dim() == 0 else self.tau[part]


#: Both ops take the same tensors first: hidden, weight and bias of the student and of the teacher, keep and tau.
TENSORS = 8


@torch.library.custom_op("motab_kernels::linear_divergence_rows", mutates_args=())
def rows_op(
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
    heads = _Heads(student, teacher, keep, tau, kind, lam, vocab_size, kernels)
    loss = torch.empty(len(student_hidden), dtype=wide_dtype(student_hidden), device=student_hidden.device)
    for part in _parts(slice(0, len(loss)), chunk_size):
        _, _, loss[part], _ = heads.forward(part)
    return loss


@rows_op.register_fake
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
    needs: list[bool],
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
    that these are in, 1 except for float16."""
    student = Head(student_hidden, student_weight, student_bias, *student_scales)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, *teacher_scales)
    kernels = kernels_of(backend, student_hidden.device, group)
    heads = _Heads(student, teacher, keep, tau, kind, lam, vocab_size, kernels)
    total, grad_hidden, grad_weight, grad_bias, unit = (
        x.zero_() for x in _empty_results(student_hidden, student_weight, needs)
    )
    unit += 1
    if keep is not None:
        scale = scale.masked_fill(~keep, 0)
    if student_hidden.dtype == torch.float16 and len(scale):
        largest = scale.abs().amax()
        unit.copy_(torch.where(largest > 0, largest / HEADROOM, 1))
    rows = min(len(student_hidden), chunk_size * CHUNKS) if any(needs) else 0
    memory = student_weight.new_empty(rows, len(student_weight))
    for block in _parts(slice(0, len(student_hidden)), chunk_size * CHUNKS):
        out = memory[: block.stop - block.start]
        for part in _parts(block, chunk_size):
            s, t, loss, saved = heads.forward(part)
            worth = scale[part].to(loss.dtype)
            total += weighted(loss, worth).sum()
            if any(needs):
                here = out[part.start - block.start : part.stop - block.start]
                heads.write_gradient(part, s, t, saved, worth / unit, here)
                if check_finite:
                    check_finite_gradient(here, part.start, group)
            del s, t, saved  # before the next ones are made
        if needs[0]:
            torch.mm(out, student_weight, out=grad_hidden[block])
            if group:
                add_ranks_(grad_hidden[block], group)
        # Hidden states that do not count may be NaN.
        counted = student_hidden[block].masked_fill((scale[block] == 0)[:, None], 0) if needs[1] else None
        if counted is not None and grad_weight.dtype == out.dtype:
            grad_weight.addmm_(out.T, counted)
        elif counted is not None:  # sums over many positions, which float16 does not hold
            product = torch.addmm(out.new_zeros(1), out.T, counted, beta=0, alpha=1 / HEADROOM)
            grad_weight.add_(product, alpha=HEADROOM)
        if needs[2]:
            grad_bias += out.sum(0, dtype=total.dtype)
    return total, grad_hidden, grad_weight, grad_bias, unit


@total_op.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _, needs, *_ = args[TENSORS - 2 :]
    return _empty_results(student_hidden, student_weight, needs)


def _empty_results(hidden: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = wide_dtype(hidden)
    of_weight = dtype if weight.dtype == torch.float16 else weight.dtype
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=of_weight),
        hidden.new_empty(weight.shape[0] if needs[2] else 0, dtype=dtype),
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
    ctx.is_handed_out = True
    *gradients, unit = ctx.saved_tensors
    return _scaled(gradients, ctx.needs_input_grad, upstream * unit, ctx.dtype)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]


def _backward_rows(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("fused_linear_divergence")
    needs = list(ctx.needs_input_grad[:3])
    tensors = ctx.saved_tensors  # once: checkpoints compute them for one look only
    with torch.autocast(upstream.device.type, enabled=False):  # whatever the backward pass runs under
        _, *gradients, unit = total_op(*tensors, upstream.contiguous(), needs, *ctx.options)
    _, weight, *_ = tensors
    factor = unit if weight.dtype == torch.float16 else None
    return _scaled(gradients, ctx.needs_input_grad, factor, weight.dtype)


def _scaled(
    gradients: Sequence[Tensor], needs: Sequence[bool], factor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """The gradients times the factor, rounded to the dtype; None for each input of the op that needs none."""

    def scaled(x: Tensor) -> Tensor:
        if factor is None:
            return x.to(dtype)
        # For float16 the factor may be larger than it holds. In place, because a weight's gradient is large; a second
        # backward pass then raises, as its tensors have changed.
        if torch.compiler.is_compiling():
            return (x * factor if x.dtype == factor.dtype else x.to(factor.dtype) * factor).to(dtype)
        x = x.copy_(x.float() * factor) if x.dtype == torch.float16 else x.mul_(factor.to(x.dtype))
        return x.to(dtype)

    needed = [scaled(x) if need else None for x, need in zip(gradients, needs[: len(gradients)], strict=True)]
    return (*needed, *(None,) * (len(needs) - len(needed)))


total_op.register_autograd(_backward_total, setup_context=_setup_total)
rows_op.register_autograd(_backward_rows, setup_context=_setup_rows)

"""`divergence_loss`: a divergence of a student's from a teacher's distributions, with its gradient, from logits.

B rows, T tokens, V shared vocabulary, R = B * T positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from motab_kernels.backend import choose_backend
from motab_kernels.divergence_checks import (
    check_finite_gradient,
    check_tensors,
    divisor,
    refuse_second_derivative,
    refuse_transforms,
    resolve,
    temperature_tensor,
)
from motab_kernels.divergence_kernels import divergence_forward, weighted
from motab_kernels.tensors import as_normal, is_batched, is_traced, wide_dtype, with_tokens
from motab_kernels.vocab_parallel import columns_here, kernels_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["divergence_loss"]


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    check_finite: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """A divergence between teacher and student, differentiable by the student's logits.

    Equivalent, with `V = min(V_student, V_teacher, vocab_size)`, to::

        q = (student_logits[..., :V].float() / temperature).softmax(-1)
        p = (teacher_logits[..., :V].float() / temperature).softmax(-1)
        kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)
        loss = {
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),      # m = beta * p + (1 - beta) * q
            "skew_forward_kl": kl(p, alpha * p + (1 - alpha) * q),
            "skew_reverse_kl": kl(q, (1 - alpha) * p + alpha * q),
            "tvd": 0.5 * (p - q).abs().sum(-1),
        }[divergence]

    where 0 log 0 is 0: a column at -inf has no probability. jsd with beta 0 is forward_kl, with beta 1 reverse_kl, as
    in TRL. The loss is not multiplied by the square of the temperature.

    The gradient is the only new tensor of the size of the logits: the forward pass saves its inputs and 24 bytes a
    position, from which the backward pass recomputes. forward_kl and reverse_kl read the logits once, the others
    twice, because they need the normalisers first; the backward pass reads them once. Differentiable once, by
    backward(): second derivatives, and those of `torch.func`, are refused.

    Args:
        student_logits: (B, V_student) or (B, T, V_student); float32, bfloat16 or float16; "torch" also takes
            float64, and computes in it. Any strides; "triton" copies a tensor whose vocabulary is not contiguous.
        teacher_logits: the same leading shape, (..., V_teacher); without gradient.
        divergence: "forward_kl" | "reverse_kl" | "jsd" | "skew_forward_kl" | "skew_reverse_kl" | "tvd".
        beta: of jsd, 0 to 1.
        alpha: of the skew kinds, at least 0 and below 1; DistiLLM takes 0.1.
        temperature: 1e-30 to 1e30, divides both sides' logits. Float, or a floating-point tensor without gradient, 0-d
            or (B,), on the device.
        mask: bool, the leading shape. A position where it is False does not count, whatever its logits: its loss and
            its gradient are 0. None: all count.
        weights: floating-point, the leading shape; multiply the positions' losses. Without gradient.
        reduction: "none" (each position's, in the leading shape), "sum", "mean" (the sum over the number of positions
            in the mask) or "batchmean" (the sum over B).
        num_items: replaces the divisor of "mean" and "batchmean": with gradient accumulation, the number of positions
            of all micro-batches together, so that the loss does not depend on how a batch is split. A number
            from 1e-30 to 1e30, or a 0-d tensor without gradient, which may be 0 where no position counts.
        vocab_size: how many columns count, at most. None: all that both sides have. Other columns are padding, with no
            probability and a gradient of 0.
        inplace_backward: write the gradient over `student_logits`, whose values are then lost: for logits that are not
            read again, as those of a language-model head. Needs no extra memory. `torch.compile` ignores it.
        check_finite: raise if the gradient is not finite. The host waits for the device.
        backend: "triton", "cpu" (C++), "torch" (plain PyTorch, some positions at a time), or None: "triton" on a GPU,
            "cpu" on a CPU, "torch" where that is not installed or the logits are float64.
        group: the ranks among which the vocabulary is split, as by tensor parallelism; every rank calls. Both logits
            are then this rank's slice: the same number of columns for student and teacher, which follow the columns of
            the previous rank. Each rank returns the loss of the whole vocabulary, equal to the last bit, and gets the
            gradient of its slice, not multiplied by the number of ranks. `vocab_size` counts columns of all ranks and
            needs slices of one width; the last ranks may have no column that counts. One all-gather of 24 bytes a
            position, and one of 8 for the kinds that read the logits twice; none in the backward pass, except with
            `check_finite`. If the vocabularies differ in size, pad both to one size before they are split, and pass
            the shared count as `vocab_size`.

    Returns:
        float32 (float64 for float64 logits): 0-d, or of the leading shape for "none". 0, with a gradient of 0, where
        nothing counts. A position with NaN or +inf among the shared logits of a side, or with no finite one, has
        a loss of NaN. Where only one side excludes a column, forward_kl or reverse_kl may be inf; the gradient
        of an infinite reverse_kl is infinite too. A column at -inf has a gradient of 0. jsd, the skew kinds
        and tvd subtract one side's logits from the other's: where the two lie 1e4 apart, float32 leaves these losses
        two to three digits, and at 1e7 hardly one.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, a teacher or another tensor that asks for a
            gradient and gets none, an unknown divergence, reduction or backend; with `group`, slices that student and
            teacher do not share, or ranks that differ in `vocab_size` or in the width that it needs (compared once for
            equal calls, because the host waits for it); in the backward pass, with `check_finite`, a gradient that is
            not finite.

    Source: forward KL, Hinton et al. 2015 (arXiv 1503.02531); jsd, GKD (arXiv 2306.13649, equation 1); skew KL,
    DistiLLM (arXiv 2402.03898, equations 4 and 5); tvd, f-Distill (arXiv 2307.15190).
    """
    kind, lam = resolve(divergence, beta, alpha)
    V = check_tensors(student_logits, teacher_logits, mask, weights, vocab_size)
    refuse_transforms("divergence_loss", student_logits)
    tau = temperature_tensor(temperature, student_logits.shape[0], student_logits.device)
    divide = divisor(reduction, num_items, mask, student_logits)
    backend = choose_backend(backend, student_logits, teacher_logits)
    if group is not None:
        V = columns_here(group, student_logits.shape[-1], teacher_logits.shape[-1], vocab_size, student_logits.device)
    name = "" if group is None else group.group_name
    mask = None if mask is None else as_normal(mask)
    loss, _ = divergence_op(
        student_logits,
        as_normal(teacher_logits.detach()),
        mask,
        tau,
        kind,
        lam,
        V,
        inplace_backward,
        check_finite,
        backend,
        name,
    )
    if weights is not None:
        loss = weighted(loss, weights, mask)
    return loss if reduction == "none" else (loss.sum() / divide).to(loss.dtype)


@torch.library.custom_op("motab_kernels::divergence", mutates_args=())
def divergence_op(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    tau: Tensor | None,
    kind: str,
    lam: float,
    vocab_size: int,
    inplace_backward: bool,
    check_finite: bool,
    backend: str,
    group: str = "",
) -> tuple[Tensor, Tensor]:
    """The loss in the leading shape, and what the backward pass needs besides its inputs, (R, 6)."""
    student, teacher = (with_tokens(x)[..., :vocab_size] for x in (student_logits, teacher_logits))
    loss, saved = _empty_results(student_logits, teacher_logits)
    if loss.numel() == 0:
        return loss, saved
    keep = None if mask is None else mask.reshape(-1).contiguous()  # an expanded mask has strides of 0
    found, saved = divergence_forward(
        kernels_of(backend, student.device, group), student, teacher, tau, keep, kind, lam
    )
    return found.view(loss.shape), saved


@divergence_op.register_fake
def _(student_logits: Tensor, teacher_logits: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _empty_results(student_logits, teacher_logits)


def _empty_results(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(student_logits, teacher_logits)
    loss = student_logits.new_empty(student_logits.shape[:-1], dtype=dtype)
    return loss, student_logits.new_empty((loss.numel(), 6), dtype=dtype)


@torch.library.custom_op("motab_kernels::divergence_backward", mutates_args=())
def divergence_backward_op(
    grad_loss: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    tau: Tensor | None,
    saved: Tensor,
    kind: str,
    lam: float,
    vocab_size: int,
    check_finite: bool,
    backend: str,
    group: str = "",
) -> Tensor:
    out = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    arguments = (grad_loss, student_logits, teacher_logits, mask, tau, saved, kind, lam, vocab_size, check_finite)
    write_gradient(*arguments, backend, group, out)
    return out


@divergence_backward_op.register_fake
def _(grad_loss: Tensor, student_logits: Tensor, *args: object) -> Tensor:
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)


def write_gradient(
    grad_loss: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    tau: Tensor | None,
    saved: Tensor,
    kind: str,
    lam: float,
    vocab_size: int,
    check_finite: bool,
    backend: str,
    group: str,
    out: Tensor,
) -> None:
    """Write the gradient by the student's logits to `out`, which has their shape and may share their memory."""
    if grad_loss.numel() == 0:
        return
    scale = grad_loss if mask is None else grad_loss.masked_fill(~mask, 0)
    student, teacher, target = (with_tokens(x)[..., :vocab_size] for x in (student_logits, teacher_logits, out))
    kernels = kernels_of(backend, student.device, group)
    kernels.divergence_gradient(student, teacher, tau, saved, scale.reshape(-1).contiguous(), kind, lam, target)
    with_tokens(out)[..., vocab_size:].zero_()
    if check_finite:
        check_finite_gradient(out, group)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, mask, tau, *options = inputs
    ctx.save_for_backward(student, teacher, mask, tau, output[1])
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if getattr(ctx, "is_over", False):
        raise ValueError(
            "divergence_loss: expected one backward pass with inplace_backward, which writes over the logits, got "
            "another one; leave inplace_backward off"
        )
    student, teacher, mask, tau, saved = ctx.saved_tensors
    kind, lam, vocab_size, inplace, check_finite, backend, group = ctx.options
    refuse_second_derivative("divergence_loss")
    arguments = (grad_loss, student, teacher, mask, tau, saved, kind, lam, vocab_size, check_finite, backend, group)
    if is_traced(student, teacher, grad_loss) or is_batched(grad_loss):
        gradient = divergence_backward_op(*arguments)
    else:
        # Rows of an expanded tensor share memory; so may both sides, as shifted views of one tensor.
        over = inplace and student.stride(-1) == 1 and not _overlaps(student) and not _overlap(student, teacher)
        ctx.is_over = over
        gradient = student.detach() if over else torch.empty_like(student, memory_format=torch.contiguous_format)
        write_gradient(*arguments, gradient)
    return (gradient, *(None,) * 10)


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors share memory, but for views of the same elements."""
    is_same = (x.data_ptr(), x.shape, x.stride(), x.dtype) == (y.data_ptr(), y.shape, y.stride(), y.dtype)
    return not is_same and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _overlaps(x: Tensor) -> bool:
    """Whether elements may share memory, as in an expanded or unfolded tensor."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


divergence_op.register_autograd(_backward, setup_context=_setup_context)

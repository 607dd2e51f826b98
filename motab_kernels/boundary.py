"""`fused_kl_boundary`: a teacher's statistics of a student's tokens, and the decision, in one pass.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from motab_kernels.arguments import DIVISORS, check_count, check_parameter, check_place, shared_columns
from motab_kernels.backend import choose_backend, implementation
from motab_kernels.boundaries import Boundary, Criterion, EntropyBoundary
from motab_kernels.boundary_checks import (
    check_out,
    check_state,
    check_tensors,
    check_values,
    check_workspace,
)
from motab_kernels.boundary_state import BoundaryState
from motab_kernels.reference.boundary import top_k_entropy
from motab_kernels.tensors import is_traced, with_tokens

__all__ = ["BoundaryOutput", "boundary_workspace", "fused_kl_boundary"]


class BoundaryOutput(NamedTuple):
    """What `fused_kl_boundary` returns, shaped like `token_ids`. At padding: 0, False, and -1 for integers."""

    forward_kl: Tensor  # float32, nats, >= 0: KL(teacher || student)
    reverse_kl: Tensor  # float32, nats, >= 0: KL(student || teacher)
    student_logprob: Tensor  # float32, nats, <= 0: of the token
    teacher_logprob: Tensor  # float32, nats, <= 0: of the token
    student_entropy: Tensor  # float32, nats, >= 0
    teacher_entropy: Tensor  # float32, nats, >= 0
    teacher_rank: Tensor  # int32: how many teacher logits exceed the token's; -1 where there is no rank
    teacher_argmax: Tensor  # int64: the first largest teacher logit's column; -1 where there is none
    score: Tensor  # float32: of the step so far, this token included
    threshold: Tensor  # float32: of the step
    stray: Tensor  # bool: the step that ends here breaches the boundary


DEFAULT = EntropyBoundary()
REST = (torch.int32, torch.int64, torch.bool)  # dtypes of teacher_rank, teacher_argmax and stray
OUTPUT_DTYPES = (torch.float32,) * 6 + (torch.int32, torch.int64, torch.float32, torch.float32, torch.bool)


def fused_kl_boundary(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    *,
    boundary: Boundary | None = None,
    state: BoundaryState | None = None,
    step_ends: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    out: BoundaryOutput | None = None,
    workspace: Tensor | None = None,
    backend: str | None = None,
) -> BoundaryOutput:
    """Divergences, entropies, log-probabilities and rank of written tokens, and whether their step strays.

    Equivalent, for the statistics, with `V = min(V_student, V_teacher, vocab_size)`::

        log_q = (student_logits[..., :V].float() / temperature).log_softmax(-1)
        log_p = (teacher_logits[..., :V].float() / temperature).log_softmax(-1)
        forward_kl = (log_p.exp() * (log_p - log_q)).sum(-1)          # KL(teacher || student)
        reverse_kl = (log_q.exp() * (log_q - log_p)).sum(-1)          # KL(student || teacher)
        student_entropy, teacher_entropy = -(log_q.exp() * log_q).sum(-1), -(log_p.exp() * log_p).sum(-1)
        student_logprob = log_q.gather(-1, token_ids[..., None])[..., 0]; teacher_logprob likewise from log_p

    where 0 log 0 is 0: a column at -inf has no probability, and a column that only one side excludes makes the KL in
    which it counts inf. At a position with NaN or +inf among the shared logits of either side, or with no finite one,
    all statistics are NaN and the step strays.

    The decision: at the token that ends a step, the step's score (see the boundary) is compared with the threshold of
    its first token. At the first step t that strays, the row breaches: `state.rollback_position` is the start of step
    `t* = argmin_k (safety_k - safety_{k-1})` over k = 1..t, the first minimum, and 0 for t = 0, where safety is the
    score, negated if low is safe; a NaN score is the deepest fall. From then on the row is frozen until
    `state.reset_`: its tokens still get statistics, with the score and threshold of the breach, but never stray.

    Not differentiable (see `divergence_loss`). Batch invariant: a row's numbers do not depend on other rows.

    Args:
        student_logits: (B, V_student) or (B, T, V_student); float32, bfloat16 or float16; "torch"
            also takes float64, and computes in it. Any strides; the kernels copy a tensor whose vocabulary
            is not contiguous.
        teacher_logits: the same leading shape, (..., V_teacher). Only shared columns are read.
        token_ids: (B,) or (B, T) int64, in [0, V); -1 is padding: it counts for nothing, whatever its logits.
            Other values raise on the CPU; on a GPU, where a check would make the host wait, such a token has NaN
            log-probabilities and its step strays.
        boundary: `EntropyBoundary` (None: with its defaults), `FixedBoundary` or `MovingAverageBoundary`.
        state: changed in place; it belongs to one boundary (`reset_` it before another's use). None: a fresh one,
            discarded after the call.
        step_ends: (B,) or (B, T) bool, whether the token ends a step. None: every token is a step.
        temperature: 1e-30 to 1e30, divides both sides' logits. Float, or a floating-point tensor, 0-d or (B,), on the
            device; there it is not checked.
        vocab_size: how many columns count, at most. None: all that both sides have.
        out: a `BoundaryOutput` of contiguous tensors to write into and return. None: new tensors.
        workspace: scratch memory of "triton", from `boundary_workspace`, that calls on one stream may share.
            None: new memory. With `out`, `workspace` and `state` given, a call allocates nothing and can be captured
            in a CUDA graph (`entropy_top_k` allocates; a first call puts numbers on the device).
        backend: "triton" (on a GPU) and "cpu" (C++) are kernels that read the logits once, "torch" is plain
            PyTorch. None: the kernels of the device where they are installed and the logits are not float64,
            else "torch".

    Returns:
        `BoundaryOutput` of tensors shaped like `token_ids`. Statistics are within 1e-5 of float64 on the same
        logits, or within 1e-6 of their size where that is more.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a state for another batch size or window, an
            unknown backend, on the CPU a token or a temperature out of range. Nothing has been changed then.

    Source: MOTAB, arXiv 2605.19433.
    """
    boundary = DEFAULT if boundary is None else boundary
    if not isinstance(boundary, Boundary):
        expected = "EntropyBoundary, FixedBoundary or MovingAverageBoundary"
        raise ValueError(f"boundary: expected {expected}, got {type(boundary).__name__}")
    criterion = boundary.criterion
    check_tensors(student_logits, teacher_logits, token_ids, step_ends)
    V = shared_columns(student_logits.shape[-1], teacher_logits.shape[-1], vocab_size)
    check_parameter("temperature", temperature, *DIVISORS)

    B, device = token_ids.shape[0], token_ids.device
    backend = choose_backend(backend, student_logits, teacher_logits)
    if state is not None:
        check_state(state, B, criterion.window, device)
    elif backend != "cpu" or criterion.window:  # C++ needs no state that is discarded
        state = boundary.new_state(B, device)
    states = [] if state is None else list(state.tensors)
    # The overhead of a registered op is longer than the computation of one row on a CPU.
    inputs = (student_logits, teacher_logits, token_ids, step_ends, temperature, criterion.scale, criterion.theta)
    is_registered = student_logits.is_meta or is_traced(*inputs, *states, *(out or ()))
    run = fused_kl_boundary_op if is_registered else _fused_kl_boundary
    given = out
    if out is None:
        out = _empty_output(token_ids, apart=is_registered)
    else:
        check_out(out, out._fields, OUTPUT_DTYPES, token_ids)
    run(
        student_logits.detach(),
        teacher_logits.detach(),
        token_ids,
        step_ends,
        None if _is_one(temperature) else _parameter_tensor("temperature", temperature, B, device, is_registered),
        _parameter_tensor("the boundary's threshold", criterion.scale, B, device, is_registered),
        None if criterion.theta is None else _parameter_tensor("theta", criterion.theta, B, device, is_registered),
        states,
        list(out),
        workspace,
        criterion.score,
        criterion.top_k,
        V,
        backend,
    )
    if not is_registered:  # autograd is to see that what it may have saved is written over
        increment_version([*states, *(given or ())])
    return out


def boundary_workspace(batch_size: int, tokens: int, vocab_size: int, device: torch.device | str) -> Tensor:
    """Scratch memory for `fused_kl_boundary` with backend "triton", for at most these rows, tokens and columns.

    Equivalent to `torch.empty(n, dtype=torch.float32, device=device)`, where n is 10 for each position and
    each split of the vocabulary. Its contents mean nothing between calls.

    Raises:
        ValueError: a size below 0, or Triton is not installed.
    """
    for name, value in (("batch_size", batch_size), ("tokens", tokens), ("vocab_size", vocab_size)):
        check_count(name, value, minimum=0)
    gpu = implementation("boundary", "triton")
    device = torch.device(device)
    shape = gpu.workspace_shape(batch_size * tokens, vocab_size, gpu.settings_for(device))
    return torch.empty(math.prod(shape), dtype=torch.float32, device=device)


def _empty_output(token_ids: Tensor, apart: bool) -> BoundaryOutput:
    """The float32 tensors share one allocation, because each costs time, unless they are to be `apart`: compiled code
    writes to all parts of one as if they were its first, where sizes are dynamic (torch 2.13)."""
    new = functools.partial(torch.empty, dtype=torch.float32, device=token_ids.device)
    floats = [new(token_ids.shape) for _ in range(8)] if apart else new((8, *token_ids.shape)).unbind()
    rank, argmax, stray = (torch.empty_like(token_ids, dtype=x, memory_format=torch.contiguous_format) for x in REST)
    return BoundaryOutput._make((*floats[:6], rank, argmax, *floats[6:], stray))


def _fused_kl_boundary(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    step_ends: Tensor | None,
    temperature: Tensor | None,
    scale: Tensor,
    theta: Tensor | None,
    state: list[Tensor],
    out: list[Tensor],
    workspace: Tensor | None,
    score: str,
    top_k: int,
    vocab_size: int,
    backend: str,
) -> None:
    if token_ids.numel() == 0:
        return
    if token_ids.device.type == "cpu" and backend != "cpu":  # which checks them itself
        check_values(token_ids, temperature, vocab_size)

    student, teacher = student_logits, teacher_logits
    if not student.shape[-1] == teacher.shape[-1] == vocab_size:
        student, teacher = student.narrow(-1, 0, vocab_size), teacher.narrow(-1, 0, vocab_size)
    criterion = Criterion(score, scale, theta, top_k, window=state[2].shape[1] if state else 0)
    kernels = implementation("boundary", backend, student.device)
    if backend == "torch":
        student, teacher, tokens = with_tokens(student), with_tokens(teacher), with_tokens(token_ids, 2)
        ends = None if step_ends is None else with_tokens(step_ends, 2)
        results = kernels.fused_kl_boundary(
            student, teacher, tokens, ends, temperature, criterion, BoundaryState.of(*state)
        )
        for target, result in zip(out, results, strict=True):
            target.copy_(result.view(target.shape))
        return

    # Kernels read memory, which of a tensor with the negative bit holds other values.
    student, teacher = ((x if x.stride(-1) == 1 else x.contiguous()).resolve_neg() for x in (student, teacher))
    doubt = top_k_entropy(teacher, top_k, temperature).contiguous() if top_k else None
    inputs = (student, teacher, token_ids, step_ends, temperature, doubt, criterion, state, out)
    if backend == "cpu":
        if not kernels.fused_kl_boundary(*inputs):
            check_values(token_ids, temperature, vocab_size)
            raise AssertionError("the kernel refused what the check accepts")
        return

    settings = kernels.settings_for(student.device)
    shape = kernels.workspace_shape(token_ids.numel(), vocab_size, settings)
    if workspace is None:
        workspace = torch.empty(shape, dtype=torch.float32, device=student.device)
    check_workspace(workspace, math.prod(shape), student.device)
    kernels.fused_kl_boundary(*inputs, workspace, settings)


fused_kl_boundary_op = torch.library.custom_op(
    "motab_kernels::fused_kl_boundary", _fused_kl_boundary, mutates_args=("state", "out", "workspace")
)


@fused_kl_boundary_op.register_fake
def _(*args: object, **kwargs: object) -> None:
    """Everything is written in place."""


#: By value, device and stream: another stream would not wait for the copy.
_constants: dict[tuple[float, torch.device, int], Tensor] = {}
MOST_CONSTANTS = 4096


def _parameter_tensor(name: str, value: float | Tensor, B: int, device: torch.device, is_traced: bool) -> Tensor:
    """A parameter as a tensor on the device. A number is copied there once, and the copy kept; not that of a trace."""
    if isinstance(value, Tensor):
        check_place(name, value, B, device)
        return value.detach()
    if is_traced or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.full((), value, dtype=torch.float64, device=device)  # in the graph's own memory
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (float(value), device, stream)
    constant = _constants.get(key)
    if constant is None:
        with torch.inference_mode(False):
            constant = torch.full((), value, dtype=torch.float64, device=device)
        if len(_constants) >= MOST_CONSTANTS:
            _constants.clear()
        _constants[key] = constant
    return constant


def _is_one(temperature: float | Tensor) -> bool:
    return not isinstance(temperature, Tensor) and temperature == 1.0

"""Checks of the arguments that the ops have in common.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from motab_kernels.tensors import DTYPES, is_traced

# Python's own first: to look one up among the abstract kinds takes a microsecond.
INTEGERS = (int, Integral, torch.SymInt)
NUMBERS = (float, int, Real, torch.SymFloat, torch.SymInt)
DIVISORS = 1e-30, 1e30  # the range of a number that logits are divided by: far from where float32's reciprocals end


def check_parameter(name: str, value: float | Tensor, least: float = -math.inf, most: float = math.inf) -> None:
    """A finite number within the bounds, or a floating-point tensor of such, 0-d or (B,).

    A tensor's values are checked on the CPU only: elsewhere the host would have to wait.
    """
    if isinstance(value, Tensor):
        if value.dim() > 1 or not value.dtype.is_floating_point:
            got = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"{name}: expected a floating-point tensor, 0-d or (B,), got {got}")
        if value.device.type == "cpu" and not is_traced(value):
            check_values_of(name, value, least, most)
        return
    if not is_number(value):
        raise ValueError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if not (least <= value <= most and -math.inf < value < math.inf):  # isfinite is not for symbolic numbers
        raise ValueError(f"{name}: expected a finite number{_bounds(least, most)}, got {value}")


def check_values_of(name: str, parameter: Tensor, least: float, most: float) -> None:
    """The values of a parameter that `check_parameter` accepts, on the CPU."""
    if not ((parameter >= least) & (parameter <= most if most < math.inf else parameter.isfinite())).all():
        raise ValueError(f"{name}: expected finite values{_bounds(least, most)}, got {parameter.tolist()}")


def _bounds(least: float, most: float) -> str:
    if most < math.inf:
        return f" from {least:g} to {most:g}"
    return f" >= {least:g}" if least > -math.inf else ""


def is_number(value: object) -> bool:
    """NumPy's and a trace's are numbers too, and bool is none."""
    return isinstance(value, NUMBERS) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """As `is_number`, of whole numbers."""
    return isinstance(value, INTEGERS) and not isinstance(value, bool)


def check_number(name: str, value: float) -> None:
    """A finite number, and no tensor, whose gradient would be lost and whose value the host would have to wait for."""
    if not is_number(value) or not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_count(name: str, value: int, minimum: int = 1) -> None:
    if not is_integer(value) or value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}")


def check_place(name: str, parameter: Tensor, B: int, device: torch.device) -> None:
    if parameter.device != device or parameter.shape not in ((), (B,)):
        got = f"shape {tuple(parameter.shape)} on {parameter.device}"
        raise ValueError(f"{name}: expected a number or a tensor, 0-d or ({B},), on {device}, got {got}")


def check_whole(name: str, x: object) -> None:
    """A dense tensor, all of which this process has."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if type(x) is not Tensor and (placements := getattr(x, "placements", None)) is not None:
        raise ValueError(
            f"{name}: expected a tensor that this process has whole, got a DTensor of {placements}: unshard() the "
            "FSDP2 module that holds it; where tensor parallelism splits the vocabulary, a loss takes to_local() and a "
            "group"
        )
    if x.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {x.layout}")


def check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        check_whole(name, logits)
        if logits.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {logits.dtype}")
        if logits.dim() not in (2, 3):
            raise ValueError(f"{name}: expected shape (B, V) or (B, T, V), got {tuple(logits.shape)}")


def shared_columns(V_student: int, V_teacher: int, vocab_size: int | None) -> int:
    """How many columns count: those that both sides have, at most `vocab_size`."""
    V = min(V_student, V_teacher)
    if V == 0:
        expected = "student_logits, teacher_logits: expected a shared vocabulary"
        raise ValueError(f"{expected}, got {V_student} and {V_teacher} columns")
    if vocab_size is None:
        return V
    check_count("vocab_size", vocab_size)
    return min(V, vocab_size)

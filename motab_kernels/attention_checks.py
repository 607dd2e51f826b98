"""What `ragged_attention` refuses."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rows: Tensor | None, sinks: Tensor | None
) -> None:
    for name, x in (("query", query), ("keys", keys), ("values", values)):
        if x.dim() != 4 or x.dtype not in DTYPES or (x.shape[-1] > 1 and x.stride(-1) != 1):
            expected = "4 dimensions, the last contiguous, of float32, bfloat16, float16 or float64"
            raise ValueError(f"{name}: expected {expected}, got {tuple(x.shape)} {x.dtype} with strides {x.stride()}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(f"{name}: expected {query.dtype} on {query.device}, got {x.dtype} on {x.device}")
    b, H_q, _, D = query.shape
    B, H, S, _ = keys.shape
    for name, x in (("keys", keys), ("values", values)):
        if x.shape != (B, H, S, D):
            raise ValueError(f"{name}: expected shape (B, H, S, {D}) as the keys and the query, got {tuple(x.shape)}")
    if H == 0 or H_q % H:
        raise ValueError(f"query: expected heads that are a multiple of the keys' {H}, got {H_q}")
    if rows is None and b != B:
        raise ValueError(f"query: expected {B} rows as the keys, got {b}; give rows")
    for name, index in (("lengths", lengths), ("rows", rows)):
        if index is not None and (index.shape != (b,) or index.dtype != torch.int64 or index.device != query.device):
            got = f"{tuple(index.shape)} {index.dtype} on {index.device}"
            raise ValueError(f"{name}: expected ({b},) int64 on {query.device}, got {got}")
    if sinks is not None and (sinks.shape != (H_q,) or not sinks.is_floating_point() or sinks.device != query.device):
        got = f"{tuple(sinks.shape)} {sinks.dtype} on {sinks.device}"
        raise ValueError(f"sinks: expected ({H_q},) floating point on {query.device}, got {got}")


def check_settings(
    scale: float | None, window: int | None, softcap: float | None, visible_length: int | None, S: int, T: int
) -> tuple[int, int]:
    """The window and the visible length, as numbers."""
    if scale is not None and not abs(scale) < float("inf"):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected None or an int of at least 1, got {window}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected None or a finite number above 0, got {softcap}")
    if T > S:
        raise ValueError(f"query: expected at most the {S} tokens that the keys have slots for, got {T}")
    if visible_length is not None and not T <= visible_length <= S:
        raise ValueError(f"visible_length: expected T = {T} to S = {S}, got {visible_length}")
    return S if window is None else window, S if visible_length is None else visible_length


def check_indices(lengths: Tensor, rows: Tensor | None, B: int, longest: int) -> None:
    """On the CPU, where looking costs nothing."""
    for name, index, most in (("lengths", lengths, longest), ("rows", rows, B - 1)):
        if index is not None and (int(index.min()) < 0 or int(index.max()) > most):
            raise ValueError(f"{name}: expected values in [0, {most}], got {index.tolist()}")

"""Kernels for distillation that follow a student token by token. They need only torch, and Triton on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from motab_kernels.attention import ragged_attention
from motab_kernels.boundaries import Boundary, EntropyBoundary, FixedBoundary, MovingAverageBoundary
from motab_kernels.boundary import BoundaryOutput, boundary_workspace, fused_kl_boundary
from motab_kernels.boundary_state import BoundaryState
from motab_kernels.divergence import divergence_loss
from motab_kernels.kv_cache import truncate_kv_cache_
from motab_kernels.linear_divergence import fused_linear_divergence
from motab_kernels.sampling import Samples, sample_from_logits

if TYPE_CHECKING:
    from motab_kernels.ragged_kv_cache import RaggedKVCache

__all__ = [
    "Boundary",
    "BoundaryOutput",
    "BoundaryState",
    "EntropyBoundary",
    "FixedBoundary",
    "MovingAverageBoundary",
    "RaggedKVCache",
    "Samples",
    "boundary_workspace",
    "divergence_loss",
    "fused_kl_boundary",
    "fused_linear_divergence",
    "ragged_attention",
    "sample_from_logits",
    "truncate_kv_cache_",
]


def __getattr__(name: str) -> Any:
    # The only name that needs transformers: an import above would make every user of a kernel need it.
    if name == "RaggedKVCache":
        from motab_kernels.ragged_kv_cache import RaggedKVCache

        return RaggedKVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

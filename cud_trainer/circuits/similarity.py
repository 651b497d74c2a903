"""Distances between circuit vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.layers import widest_float


def length(a: Tensor) -> Tensor:
    """Euclidean length along the last axis, which is kept; squares of tiny edge scores do not underflow."""
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=widest_float(a.device)).to(a.dtype)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """`1 - cos(a, b)`, in [0, 2]; NaN when either vector is zero (an empty circuit has no direction)."""
    return (1 - (a / length(a) * (b / length(b))).sum(-1)).clamp(0, 2)


def jaccard_distance(a: Tensor, b: Tensor) -> Tensor:
    """`1 - sum min(|a|, |b|) / sum max(|a|, |b|)`, in [0, 1]; the usual Jaccard distance for binary vectors.

    NaN when both are zero.
    """
    a, b = a.abs(), b.abs()
    union = torch.maximum(a, b).sum(-1)
    return 1 - torch.minimum(a, b).sum(-1) / union.where(union > 0, torch.full_like(union, torch.nan))


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Share of edges that are in exactly one of the two circuits, in [0, 1]; an edge is in where it is not 0."""
    return ((a != 0) != (b != 0)).to(a.dtype).mean(-1)


DISTANCES = {"cosine": cosine_distance, "jaccard": jaccard_distance, "hamming": hamming_distance}


def distance(a: Tensor, b: Tensor, kind: str = "cosine") -> Tensor:
    """Distance between circuit vectors along the last axis (broadcasting); `ValueError` for an unknown kind."""
    if kind not in DISTANCES:
        raise ValueError(f"unknown circuit distance {kind!r}; choose one of {sorted(DISTANCES)}")
    return DISTANCES[kind](a, b)

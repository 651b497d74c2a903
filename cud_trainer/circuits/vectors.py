"""From edge scores to circuit vectors. Pure functions of `edges [N, E]`, one row per sample."""

from __future__ import annotations

import torch
from torch import Tensor

VECTORS = ("signed", "binary", "log")
# Edge scores below this share of the sample's largest count as this share. Float32 scores are good to about 1e-6 of the
# largest, so that the logarithm of smaller ones would depend on the batch they were computed in.
LOG_FLOOR = 1e-4


def top_k_mask(edges: Tensor, k: int | None) -> Tensor:
    """True on the `k` edges of each sample with the largest |score|, `[N, E]`; all edges for `k=None`.

    Edges that score exactly 0 are never in a circuit, so a circuit can hold fewer than `k` edges, or none. Of equally
    strong edges the first ones are taken.
    """
    present = edges != 0
    if k is None or k >= edges.shape[1]:
        return present
    mask = torch.zeros_like(present)
    mask.scatter_(1, edges.abs().argsort(dim=1, descending=True, stable=True)[:, :k], True)
    return mask & present


def circuit_vectors(edges: Tensor, *, kind: str = "signed", k: int | None = None) -> Tensor:
    """Vector of each sample's circuit, float `[N, E]`.

    Args:
        edges: edge scores, `[N, E]`.
        kind: `"signed"`: the scores; `"binary"`: 1 on the circuit's edges; `"log"`: log |score| of every edge (the
            logarithm is not sparse, so `k` does not apply).
        k: keep the `k` edges with the largest |score| (top-k circuit), `None` for all.

    Raises:
        ValueError: for an unknown kind, `k < 1`, or `k` with `"log"`.
    """
    if kind not in VECTORS:
        raise ValueError(f"unknown circuit vector {kind!r}; choose one of {list(VECTORS)}")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k must be a positive number of edges or None, got {k!r}")
    if kind == "log":
        if k is not None:
            raise ValueError("log-magnitude vectors use all edges: k must be None")
        magnitude = edges.abs()
        floor = magnitude.amax(1, keepdim=True) * LOG_FLOOR
        return magnitude.maximum(floor).clamp(min=torch.finfo(edges.dtype).tiny).log()
    mask = top_k_mask(edges, k)
    return mask.to(edges.dtype) if kind == "binary" else edges * mask

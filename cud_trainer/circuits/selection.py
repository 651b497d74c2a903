"""Which edges make a sample's circuit. Vectorised over samples: no edge objects, no loop over samples."""

from __future__ import annotations

import torch
from torch import Tensor

from .graph import Graph
from .vectors import top_k_mask

SELECTIONS = ("all", "top_k", "threshold", "greedy")
# Samples are taken in groups whose score matrices hold this many bytes.
CHUNK_BYTES = 256 * 2**20


def check_selection(selection: str, k: int | None, threshold: float | None) -> None:
    """Raise `ValueError` for an unknown selection, or a `k` or `threshold` that is missing or not its own."""
    if selection not in SELECTIONS:
        raise ValueError(f"unknown circuit selection {selection!r}; choose one of {list(SELECTIONS)}")
    for name, value, users in (("k", k, ("top_k", "greedy")), ("threshold", threshold, ("threshold",))):
        if (selection in users) != (value is not None):
            verb = "needs" if selection in users else "takes no"
            raise ValueError(f"circuit selection {selection!r} {verb} {name}, got {value!r}")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k must be a positive number of edges, got {k!r}")
    if threshold is not None and (isinstance(threshold, bool) or not threshold > 0):
        raise ValueError(f"threshold must be a positive number, got {threshold!r}")


def select_circuits(
    edges: Tensor,
    graph: Graph,
    *,
    selection: str = "top_k",
    k: int | None = None,
    threshold: float | None = None,
    prune: bool = False,
) -> Tensor:
    """Edges of each sample's circuit, bool `[N, n_edges]`.

    Edges that score exactly 0 are never in a circuit, so one can have fewer than `k` edges, or none.

    Args:
        edges: edge scores, `[N, n_edges]`; only their absolute values matter.
        selection: `"all"`; `"top_k"`, the `k` strongest edges; `"threshold"`, those of at least `threshold`; `"greedy"`
            (Hanna et al. 2024): from the logits up, `k` times the strongest edge into a node that is in already.
        prune: keep only edges on a path from the embedding to the logits.

    Raises:
        ValueError: see `check_selection`.
    """
    check_selection(selection, k, threshold)
    scores = edges.abs()
    present = top_k_mask(edges, k if selection == "top_k" else None)
    if selection == "threshold":
        assert threshold is not None
        present &= scores >= threshold
    elif selection == "greedy":
        assert k is not None
        per_sample = graph.mask.numel() * scores.element_size()
        groups = scores.split(max(1, CHUNK_BYTES // per_sample))
        present = torch.cat([_greedy(group, graph, k) for group in groups]) if len(scores) else present
    return prune_circuits(present, graph) if prune else present


def _greedy(scores: Tensor, graph: Graph, k: int) -> Tensor:
    """Every destination's incoming edges are sorted once; then `k` times the best of the open destinations."""
    size, n_sources = len(scores), len(graph.sources)
    matrix = scores.new_zeros(size, *graph.mask.shape)
    matrix[:, graph.mask] = scores
    order = matrix.argsort(dim=1, descending=True, stable=True)  # [N, rank, D] of sources
    ranked = matrix.gather(1, order)
    chosen = torch.zeros(size, *graph.mask.shape, dtype=torch.bool)
    owned = graph.owned  # [S, D]
    samples = torch.arange(size)
    rank = torch.zeros(size, len(graph.destinations), dtype=torch.long)
    open_ = torch.zeros(size, len(graph.destinations), dtype=torch.bool)
    open_[:, -1] = True
    head = torch.where(open_, ranked[:, 0], torch.zeros(()).to(ranked))  # strongest edge that is left, by destination
    for _ in range(k):
        best, destination = head.max(1)
        going = best > 0
        if not going.any():
            break
        place = rank[samples, destination]
        source = order[samples, place, destination]
        chosen[samples[going], source[going], destination[going]] = True
        rank[samples, destination] += 1
        nothing_left = place + 1 >= n_sources
        after = ranked[samples, (place + 1).clamp(max=n_sources - 1), destination].masked_fill(nothing_left, 0.0)
        head[samples, destination] = torch.where(going, after, head[samples, destination])
        opened = owned[source] & ~open_ & going.unsqueeze(1)
        open_ |= opened
        head = torch.where(opened, ranked[:, 0], head)
    return chosen[:, graph.mask]


def prune_circuits(circuits: Tensor, graph: Graph) -> Tensor:
    """Without the edges that are on no path from the embedding to the logits, bool `[N, n_edges]`."""
    matrix = torch.zeros(len(circuits), *graph.mask.shape, dtype=torch.bool)
    matrix[:, graph.mask] = circuits
    reached = _reached(matrix, graph)
    matrix &= reached.unsqueeze(2)
    matrix &= _useful(matrix, graph).unsqueeze(1)
    return matrix[:, graph.mask]


def _reached(matrix: Tensor, graph: Graph) -> Tensor:
    """Sources that something leads to from the embedding, `[N, S]`."""
    reached = torch.zeros(len(matrix), len(graph.sources), dtype=torch.bool)
    reached[:, 0] = True
    for sources, destinations in graph.steps:
        arrived = (matrix[:, :, destinations] & reached.unsqueeze(2)).any(1)
        reached[:, sources] = (arrived.unsqueeze(1) & graph.owned[sources, destinations]).any(2)
    return reached


def _useful(matrix: Tensor, graph: Graph) -> Tensor:
    """Destinations from which something leads to the logits, `[N, D]`."""
    useful = torch.zeros(len(matrix), len(graph.destinations), dtype=torch.bool)
    useful[:, -1] = True
    for sources, destinations in reversed(graph.steps):
        leads = (matrix[:, sources] & useful.unsqueeze(1)).any(2)  # the node's output is read by something useful
        useful[:, destinations] = (leads.unsqueeze(2) & graph.owned[sources, destinations]).any(1)
    return useful

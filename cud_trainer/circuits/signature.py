"""Signature of a circuit: how deep, how long, through what (the mechanisms of easy and hard samples in the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from .graph import Graph

SIGNATURE = (
    "mean_edge_length",
    "mean_source_depth",
    "mean_destination_depth",
    "late_share",
    "attention_share",
    "mlp_share",
    "longest_path",
    "n_edges",
)


def circuit_signature(edges: Tensor, graph: Graph, circuits: Tensor | None = None) -> dict[str, Tensor]:
    """Numbers that say where in the model a circuit lies, each `[N]`.

    Means and shares weight every edge of the circuit by its |score|. Layers count from 0; the embedding is layer -1,
    the logits are layer `L`.

    - `mean_edge_length`: layers from source to destination, 0 (heads to the MLP of their layer) to L + 1;
    - `mean_source_depth`, `mean_destination_depth`: (layer + 1) / (L + 1), 0 = embedding, 1 = logits;
    - `late_share`: share of edges into the last third of the layers or the logits;
    - `attention_share`, `mlp_share`: share of edges out of heads, out of MLPs; the rest leaves the embedding;
    - `longest_path`: edges of the longest path from embedding to logits inside the circuit, 0 when there is none;
    - `n_edges`: edges of the circuit.

    Args:
        edges: edge scores, `[N, n_edges]`.
        circuits: bool `[N, n_edges]`, from `select_circuits`; by default all edges that do not score 0.

    Returns:
        NaN for everything but `longest_path` and `n_edges` where a circuit is empty.
    """
    circuits = edges != 0 if circuits is None else circuits
    mass = edges.abs().double() * circuits
    total = mass.sum(1)
    weights = mass / total.where(total > 0, torch.full_like(total, torch.nan)).unsqueeze(1)
    source, destination = graph.mask.nonzero(as_tuple=True)
    start, end = graph.source_layers[source].double(), graph.destination_layers[destination].double()
    kinds = torch.tensor([{"i": 0, "a": 1, "m": 2}[name[0]] for name in graph.sources])[source]
    span = graph.n_layers + 1
    columns = {
        "mean_edge_length": end - start,
        "mean_source_depth": (start + 1) / span,
        "mean_destination_depth": (end + 1) / span,
        "late_share": (end >= graph.n_layers - graph.n_layers / 3).double(),
        "attention_share": (kinds == 1).double(),
        "mlp_share": (kinds == 2).double(),
    }
    result = {name: weights @ column for name, column in columns.items()}
    result["longest_path"] = longest_path(circuits, graph).double()
    result["n_edges"] = circuits.sum(1).double()
    return result


def longest_path(circuits: Tensor, graph: Graph) -> Tensor:
    """Edges of the longest path from embedding to logits in each circuit `[N, n_edges]`, int `[N]`; 0 for none."""
    matrix = torch.zeros(len(circuits), *graph.mask.shape, dtype=torch.bool)
    matrix[:, graph.mask] = circuits
    unreached = -(2**30)
    lengths = torch.full((len(circuits), len(graph.sources)), unreached)
    lengths[:, 0] = 0

    def arriving(destinations: slice) -> Tensor:
        steps = lengths.unsqueeze(2) + 1
        return steps.where(matrix[:, :, destinations], torch.tensor(unreached)).amax(1)

    for sources, destinations in graph.steps:
        best = arriving(destinations).unsqueeze(1).where(graph.owned[sources, destinations], torch.tensor(unreached))
        lengths[:, sources] = best.amax(2)
    return arriving(slice(-1, None)).squeeze(1).clamp(min=0)

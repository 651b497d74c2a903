"""Circuits of single samples: the edge graph of a decoder, edge attribution, circuit vectors and their similarity."""

from .architectures import (
    ARCHITECTURES,
    Architecture,
    check_architecture,
)
from .attribution import EdgeAttributions, attribute_dataset, edge_attributions, mean_outputs
from .faithfulness import Faithfulness, circuit_metric, dataset_faithfulness, faithfulness
from .graph import Graph
from .parts import model_graph
from .registration import register_architecture, run_description
from .selection import SELECTIONS, prune_circuits, select_circuits
from .signature import SIGNATURE, circuit_signature
from .similarity import DISTANCES, distance
from .table import CircuitTable
from .vectors import VECTORS, circuit_vectors, top_k_mask
from .verification import verify_architecture

__all__ = [
    "ARCHITECTURES",
    "DISTANCES",
    "SELECTIONS",
    "SIGNATURE",
    "VECTORS",
    "Architecture",
    "CircuitTable",
    "EdgeAttributions",
    "Faithfulness",
    "Graph",
    "attribute_dataset",
    "check_architecture",
    "circuit_metric",
    "circuit_signature",
    "circuit_vectors",
    "dataset_faithfulness",
    "distance",
    "edge_attributions",
    "faithfulness",
    "mean_outputs",
    "model_graph",
    "prune_circuits",
    "register_architecture",
    "run_description",
    "select_circuits",
    "top_k_mask",
    "verify_architecture",
]

"""Circuits of single samples: the edge graph of a decoder, edge attribution, circuit vectors and their similarity."""

from .architectures import SUPPORTED_MODEL_TYPES, check_architecture
from .attribution import EdgeAttributions, attribute_dataset, edge_attributions
from .graph import Graph
from .similarity import DISTANCES, distance
from .table import CircuitTable
from .vectors import VECTORS, circuit_vectors, top_k_mask

__all__ = [
    "DISTANCES",
    "SUPPORTED_MODEL_TYPES",
    "VECTORS",
    "CircuitTable",
    "EdgeAttributions",
    "Graph",
    "attribute_dataset",
    "check_architecture",
    "circuit_vectors",
    "distance",
    "edge_attributions",
    "top_k_mask",
]

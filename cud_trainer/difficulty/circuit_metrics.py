"""Difficulty metrics that read circuits without comparing them; see `cud` for those that do."""

from __future__ import annotations

import numpy as np

from ..circuits import SIGNATURE, circuit_signature, select_circuits
from .context import DifficultyContext
from .registry import register_metric


@register_metric("circuit_mass", needs_circuits=True)
def circuit_mass(context: DifficultyContext) -> np.ndarray:
    """`-log(sum of |edge score|)`: a saturated answer moves little whatever edge is cut, and is hard to unlearn.

    Raises:
        ValueError: for a sample whose edges all score 0.
    """
    mass = context.edges.double().abs().sum(1)
    empty = (mass == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"the circuit of sample {context.forget.ids[empty[0]]!r} is empty: all edges score 0")
    return -mass.log().numpy()


def _check_signature(owner: str, *, name: str, k: int) -> None:
    if name not in SIGNATURE:
        raise ValueError(f"unknown circuit signature {name!r}; choose one of {list(SIGNATURE)}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"option 'k' (edges of a circuit) must be a positive integer, got {k!r}")


@register_metric("circuit_signature", needs_circuits=True, check=_check_signature)
def signature(context: DifficultyContext, *, name: str = "mean_edge_length", k: int = 200) -> np.ndarray:
    """Where the sample's circuit lies, without anchors: longer and deeper = harder (Cheng et al. 2026, mechanisms).

    Args:
        name: one of `cud_trainer.circuits.SIGNATURE`.
        k: edges of a circuit, those with the largest |score|.

    Raises:
        ValueError: for a sample whose circuit is empty.
    """
    circuits = select_circuits(context.edges, context.graph, selection="top_k", k=min(k, context.graph.n_edges))
    values = circuit_signature(context.edges, context.graph, circuits)[name].double().numpy()
    empty = np.flatnonzero(~np.isfinite(values))
    if empty.size:
        raise ValueError(
            f"the circuits of {empty.size} samples are empty, the first is {context.forget.ids[empty[0]]!r}: "
            "they have no signature"
        )
    return values

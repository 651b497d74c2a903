"""How circuits are compared, and what a calibrated score is fitted from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...circuits import DISTANCES, VECTORS
from ...registry import check_numbers

VARIANTS: dict[str, dict[str, Any]] = {
    # As published, but for cross-fitting: 75 edges chosen greedily and pruned, binary vectors, anchors that are raw
    # means, on circuits of its own (`PAPER_CIRCUITS`).
    "paper": {"vector": "binary", "k": 75, "distance": "cosine", "selection": "greedy", "prune": True},
    # A cheap relative of it: the k strongest edges with their weights, cosine.
    "top_k": {"vector": "signed", "k": 200, "distance": "cosine"},
    # The same formula on standardised log |edge score|, which keeps the circuit's mass that the cosine of raw scores
    # throws away.
    "log": {"vector": "log", "k": None, "distance": "cosine"},
    # No anchors: ridge regression from `FEATURES`, or those that are asked for, to the calibration run's residual
    # memorisation.
    "calibrated": {"vector": "log", "k": None, "distance": "cosine"},
}
# How the authors attribute: every node interpolated by itself, key and value heads once per query head.
PAPER_CIRCUITS: dict[str, Any] = {
    "method": "ig-activations",
    "steps": 5,
    "baseline": "zero",
    "metric": "prob",
    "ungroup_kv": True,
    "reference_quirk": True,
}
# What a fit reads by default. Edges are left out: they add nothing to the rest (docs/results.md), and cost the most.
FEATURES = ("hidden", "gradients", "outputs")
# What can be asked for by name besides: edges, and single numbers for fits that are to see nothing else.
ALL_FEATURES = ("edges", *FEATURES, "mass", "loss")
CIRCUIT_FEATURES = ("edges", "mass")


def checked_features(features: Sequence[str] | None) -> tuple[str, ...] | None:
    """`features` as a tuple; `ValueError` for an unknown name, one that is there twice, or none at all."""
    if features is None:
        return None
    known = not isinstance(features, str) and all(name in list(ALL_FEATURES) for name in features)
    if not known or not features or len(set(features)) < len(features):
        raise ValueError(f"features must be a list out of {list(ALL_FEATURES)}, got {features!r}")
    return tuple(features)


@dataclass(frozen=True)
class CUDSettings:
    """How circuits are compared.

    Attributes:
        variant: `"calibrated"`, a fit (the best variant in `benchmarks/results/difficulty.md`), or `"log"`, `"top_k"`
            or `"paper"`, presets of the fields below (`None` fields take their value).
        vector: `"signed"`, `"binary"` or `"log"` (see `cud_trainer.circuits.circuit_vectors`).
        k: edges of a circuit; `"all"` for all edges. Not for `"log"`.
        selection: how `k` edges are chosen, `"top_k"` or `"greedy"` (see `cud_trainer.circuits.select_circuits`).
        prune: leave out edges on no path from the embedding to the logits. Not for `"log"`.
        distance: `"cosine"`, `"jaccard"` or `"hamming"`.
        anchor_share: share of the calibration samples that make each anchor, in (0, 0.5].
        features: what `"calibrated"` is fitted from: `"hidden"` (middle hidden state), `"gradients"` (log gradient norm
            of every weight matrix) and `"outputs"` (log-probability, length, margin, entropy) by default; besides them
            `"edges"` (log |edge score|), or alone `"mass"` (log of the sum of |edge score|) and `"loss"`
            (log-probability). Without `"edges"` and `"mass"` no circuit is computed.
    """

    variant: str = "calibrated"
    vector: str | None = None
    k: int | str | None = None
    distance: str | None = None
    anchor_share: float = 0.25
    selection: str | None = None
    prune: bool | None = None
    features: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.variant not in list(VARIANTS):  # a list: an unhashable value is refused like any other
            raise ValueError(f"unknown CUD variant {self.variant!r}; choose one of {sorted(VARIANTS)}")
        preset = {"selection": "top_k", "prune": False, **VARIANTS[self.variant]}
        if self.vector is not None and self.vector != preset["vector"]:
            preset["k"] = None if self.vector == "log" else 200
        for name, value in preset.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.vector not in VECTORS:
            raise ValueError(f"unknown circuit vector {self.vector!r}; choose one of {list(VECTORS)}")
        if self.distance not in list(DISTANCES):
            raise ValueError(f"unknown circuit distance {self.distance!r}; choose one of {sorted(DISTANCES)}")
        if self.vector == "log":
            if self.k not in (None, "all"):
                raise ValueError("k does not apply to log-magnitude circuit vectors, they use all edges")
            if self.distance != "cosine":
                raise ValueError("log-magnitude circuit vectors are compared by cosine")
            if self.selection != "top_k" or self.prune:
                raise ValueError(
                    "selection and prune do not apply to log-magnitude circuit vectors, they use all edges"
                )
        elif self.k != "all" and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"k must be a positive number of edges or 'all', got {self.k!r}")
        if self.selection not in ("top_k", "greedy"):
            raise ValueError(f"unknown circuit selection {self.selection!r} for CUD; choose 'top_k' or 'greedy'")
        if self.selection == "greedy" and self.k == "all":
            raise ValueError("circuit selection 'greedy' needs a number of edges k, got 'all'")
        if not isinstance(self.prune, bool):
            raise ValueError(f"prune must be true or false, got {self.prune!r}")
        check_numbers("CUD", {"anchor_share": self.anchor_share})
        if self.variant == "calibrated":
            if self.vector != "log":
                raise ValueError(
                    f"the CUD variant 'calibrated' reads log edge scores; {self.vector!r} vectors are for 'top_k'"
                )
            object.__setattr__(self, "features", checked_features(self.features) or FEATURES)
        elif self.features is not None:
            raise ValueError(f"features belong to the CUD variant 'calibrated', not to {self.variant!r}")
        if not 0 < self.anchor_share <= 0.5:
            raise ValueError(f"anchor_share must be in (0, 0.5], got {self.anchor_share!r}")

    @property
    def raw_anchors(self) -> bool:
        """Whether an anchor is the mean of edge scores as they are, not of circuits scaled to unit length."""
        return self.variant == "paper"

    @property
    def edges_kept(self) -> int | None:
        return self.k if isinstance(self.k, int) else None

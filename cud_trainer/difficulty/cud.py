"""Circuit-guided Unlearning Difficulty (Cheng et al. 2026, arXiv 2601.09624). Pure functions.

    CUD(q) = d(q, E) / (d(q, E) + d(q, H)),   in [0, 1], higher = harder

with d a distance between circuits (1 - cosine in the paper), E and H the anchor circuits: those of samples known to be
easy and hard to unlearn, on the original model.

No variant here is the score as published. The authors attribute by exact node-wise interpolation, choose 75 edges
greedily, compare binary vectors, and make anchors as the raw mean of samples of the very set that is scored.
`"paper"` takes their formula, by default with one-pass EAP, the 200 strongest edges with their signs, and cross-fitted
anchors that are means of circuits scaled to unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from torch import Tensor

from ..circuits.graph import Graph
from ..circuits.selection import select_circuits
from ..circuits.similarity import DISTANCES, distance, length
from ..circuits.vectors import VECTORS, circuit_vectors
from ..registry import check_numbers

VARIANTS: dict[str, dict[str, Any]] = {
    # Inspired by the paper, not as published (see the module): the k strongest edges with their weights, cosine.
    "paper": {"vector": "signed", "k": 200, "distance": "cosine"},
    # The same formula on standardised log |edge score|, which keeps the circuit's mass that the cosine of raw scores
    # throws away.
    "log": {"vector": "log", "k": None, "distance": "cosine"},
    # No anchors: ridge regression from log |edge score| and more to the calibration run's residual memorisation.
    "calibrated": {"vector": "log", "k": None, "distance": "cosine"},
}
FEATURES = ("edges", "hidden", "gradients", "outputs")
PENALTIES = np.logspace(-3, 4, 15)


@dataclass(frozen=True)
class CUDSettings:
    """How circuits are compared.

    Attributes:
        variant: `"calibrated"`, a fit (the best variant in `benchmarks/results/difficulty.md`), or `"log"` or
            `"paper"`, presets of the three below (`None` fields take their value).
        vector: `"signed"`, `"binary"` or `"log"` (see `cud_trainer.circuits.circuit_vectors`).
        k: edges of a circuit; `"all"` for all edges. Not for `"log"`.
        selection: how `k` edges are chosen, `"top_k"` or `"greedy"` (see `cud_trainer.circuits.select_circuits`).
        prune: leave out edges on no path from the embedding to the logits. Not for `"log"`.
        distance: `"cosine"`, `"jaccard"` or `"hamming"`.
        anchor_share: share of the calibration samples that make each anchor, in (0, 0.5].
        features: what `"calibrated"` is fitted from: `"edges"` (log |edge score|), `"hidden"` (middle hidden state),
            `"gradients"` (log gradient norm of every weight matrix), `"outputs"` (log-probability, length, margin,
            entropy); all of them by default.
    """

    variant: str = "calibrated"
    vector: str | None = None
    k: int | str | None = None
    distance: str | None = None
    anchor_share: float = 0.25
    selection: str = "top_k"
    prune: bool = False
    features: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.variant not in list(VARIANTS):  # a list: an unhashable value is refused like any other
            raise ValueError(f"unknown CUD variant {self.variant!r}; choose one of {sorted(VARIANTS)}")
        preset = dict(VARIANTS[self.variant])
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
                    f"the CUD variant 'calibrated' reads log edge scores; {self.vector!r} vectors are for 'paper'"
                )
            features = FEATURES if self.features is None else self.features
            if isinstance(features, str) or not features or any(name not in FEATURES for name in features):
                raise ValueError(f"features must be a list out of {list(FEATURES)}, got {features!r}")
            object.__setattr__(self, "features", tuple(features))
        elif self.features is not None:
            raise ValueError(f"features belong to the CUD variant 'calibrated', not to {self.variant!r}")
        if not 0 < self.anchor_share <= 0.5:
            raise ValueError(f"anchor_share must be in (0, 0.5], got {self.anchor_share!r}")

    @property
    def edges_kept(self) -> int | None:
        return self.k if isinstance(self.k, int) else None


def make_folds(n: int, folds: int, seed: int, groups: Sequence[Any] | None = None) -> np.ndarray:
    """Random fold of each sample, int `[n]`, sizes differing by at most one sample (or group).

    Args:
        groups: samples of one group never straddle folds.

    Raises:
        ValueError: for fewer than 2 folds or fewer samples (groups) than folds.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"cross-fitting needs at least 2 folds, got {folds!r}")
    if groups is not None:
        names = sorted(set(map(str, groups)))
        if len(names) < folds:
            raise ValueError(f"cannot split {len(names)} groups into {folds} folds")
        fold_of = dict(zip(names, make_folds(len(names), folds, seed), strict=True))
        return np.array([fold_of[str(group)] for group in groups])
    if n < folds:
        raise ValueError(f"cannot split {n} samples into {folds} folds")
    fold = np.arange(n) % folds
    return np.random.default_rng(seed).permutation(fold)


def extremes(residual: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows with the lowest (easy) and the highest (hard) residual memorisation, `share` of the rows each.

    Raises:
        ValueError: with fewer than 2 rows or a constant residual, which tells nothing apart.
    """
    if len(residual) < 2:
        raise ValueError("anchors need at least 2 calibration samples")
    if np.ptp(residual) == 0:
        raise ValueError("calibration left every sample with the same residual memorisation: there are no anchors")
    count = min(max(1, round(share * len(residual))), len(residual) // 2)
    order = np.argsort(residual, kind="stable")
    return order[:count], order[-count:]


def anchor_circuit(edges: Tensor) -> Tensor:
    """Mean of the samples' edge scores after scaling each to unit length, `[E]` from `[n, E]`."""
    norms = length(edges)
    return (edges / norms.where(norms > 0, torch.ones_like(norms))).mean(0)


def log_standardisation(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over samples of log |edge score|, each `[E]`; constant edges get deviation inf."""
    vectors = circuit_vectors(edges, kind="log")
    deviation = vectors.std(0) if len(vectors) > 1 else torch.zeros(vectors.shape[1])
    return vectors.mean(0), deviation.where(deviation > 1e-6, torch.full_like(deviation, torch.inf))


def circuits_of(edges: Tensor, settings: CUDSettings, graph: Graph | None = None) -> Tensor:
    """Circuit vectors `[N, E]` as `settings` ask for; a row of zeros is an empty circuit.

    Raises:
        ValueError: for greedy selection or pruning without a graph.
    """
    kind = settings.vector or "signed"
    if kind == "log" or (settings.selection == "top_k" and not settings.prune):
        return circuit_vectors(edges, kind=kind, k=settings.edges_kept)
    if graph is None:
        raise ValueError("greedy selection and pruning need the graph of the edges")
    k = settings.edges_kept
    mask = select_circuits(
        edges, graph, selection="all" if k is None else settings.selection, k=k, prune=settings.prune
    )
    return circuit_vectors(edges * mask, kind=kind)


def cud_scores(
    edges: Tensor,
    easy: Tensor,
    hard: Tensor,
    settings: CUDSettings,
    standardisation: tuple[Tensor, Tensor] | None = None,
    graph: Graph | None = None,
) -> np.ndarray:
    """CUD of each sample, float64 `[N]` in [0, 1]; NaN where it is undefined (an empty circuit, or equal to both).

    Args:
        edges: edge scores of the samples, `[N, E]`.
        easy: edge scores of the easy anchor samples, `[n, E]`; none of the samples scored may be among them.
        hard: the same of the hard ones.
        standardisation: for log-magnitude vectors, mean and deviation `[E]` (default: those of the anchor samples).
        graph: of the edges; needed for greedy selection and pruning.
    """
    if settings.vector == "log":
        mean, deviation = standardisation or log_standardisation(torch.cat([easy, hard]))

        def vectors(x: Tensor) -> Tensor:
            return (circuit_vectors(x, kind="log") - mean) / deviation

        to_easy = distance(vectors(edges), vectors(easy).mean(0), "cosine")
        to_hard = distance(vectors(edges), vectors(hard).mean(0), "cosine")
    else:

        def vectors(x: Tensor) -> Tensor:
            return circuits_of(x, settings, graph)

        circuits = vectors(edges)
        assert settings.distance is not None
        to_easy = distance(circuits, vectors(anchor_circuit(easy)[None]), settings.distance)
        to_hard = distance(circuits, vectors(anchor_circuit(hard)[None]), settings.distance)
    total = to_easy + to_hard
    return (to_easy / total.where(total > 0, torch.full_like(total, torch.nan))).double().numpy()


def calibrated_scores(
    train: Sequence[np.ndarray],
    residual: np.ndarray,
    test: Sequence[np.ndarray],
    groups: Sequence[object] | None = None,
) -> np.ndarray:
    """Predicted rank of each test sample's residual memorisation, about 0 (easiest) to 1 (hardest), float64 `[N]`.

    Ridge regression from standardised features, each block of them scaled to the same total variance. The penalty is
    the one with the least squared error in cross-validation inside the training samples (leave-one-out; by group where
    there are groups).

    Args:
        train, test: blocks of features, `[n, p]` and `[N, p]` each, in the same order; no sample may be in both.
        residual: of the training samples, `[n]`, higher = harder. Only its ranks are used.
        groups: of the training samples.

    Raises:
        ValueError: for fewer than 3 training samples or a constant residual, which tells nothing apart.
    """
    if len(residual) < 3:
        raise ValueError("a calibrated fit needs at least 3 calibration samples")
    if np.ptp(residual) == 0:
        raise ValueError("calibration left every sample with the same residual memorisation: there is nothing to fit")
    known, new = [], []
    for values, others in zip(train, test, strict=True):
        mean, deviation = values.mean(0), values.std(0)
        scale = np.where(deviation > 1e-6, deviation, np.inf) * np.sqrt(max(1, int((deviation > 1e-6).sum())))
        known.append((values - mean) / scale)
        new.append((others - mean) / scale)
    design = np.concatenate(known, axis=1)
    # A rotation onto the samples' own span leaves a ridge fit as it is, and makes it cheap.
    _, _, axes = np.linalg.svd(design, full_matrices=False)
    target = (rankdata(residual) - 0.5) / len(residual)
    folds = None
    if groups is not None and len(set(map(str, groups))) >= 3:
        names = list(map(str, groups))
        folds = list(GroupKFold(min(5, len(set(names)))).split(design, groups=names))
    fit = RidgeCV(alphas=PENALTIES, cv=folds).fit(design @ axes.T, target)
    return fit.predict(np.concatenate(new, axis=1) @ axes.T)


def agreement(residuals: Sequence[np.ndarray], share: float, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that `at_least` of several unlearning methods count among the easiest, or hardest, `share` (paper: 3 of 5).

    Raises:
        ValueError: when they agree on no easy or no hard sample.
    """
    counts = np.zeros((2, len(residuals[0])), dtype=int)
    for residual in residuals:
        for side, rows in zip(counts, extremes(residual, share), strict=True):
            side[rows] += 1
    easy, hard = (np.flatnonzero(side >= at_least) for side in counts)
    if not easy.size or not hard.size:
        raise ValueError(
            f"{at_least} of {len(residuals)} methods agree on {easy.size} easy and {hard.size} hard samples; anchors "
            "need both: lower agreement or raise anchor_share"
        )
    return easy, hard

"""Circuit-guided Unlearning Difficulty (Cheng et al. 2026, arXiv 2601.09624). Pure functions.

    CUD(q) = d(q, E) / (d(q, E) + d(q, H)),   in [0, 1], higher = harder

with d a distance between circuits (1 - cosine in the paper), E and H the anchor circuits: those of samples known to be
easy and hard to unlearn, on the original model.

`"paper"` is the score as the authors' code computes it: exact node-wise interpolation, 75 edges chosen greedily from
the logits up and pruned, binary vectors, anchors that are the circuit of the raw mean of the anchor samples' edge
scores. What differs: anchors are cross-fitted here, and a sample whose circuit is empty (0.5 there) is an error that
names it. `"top_k"` is a cheap relative: one-pass EAP, the 200 strongest edges with their signs, anchors that are means
of circuits scaled to unit length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from torch import Tensor

from ...circuits import Graph, circuit_vectors, distance, select_circuits
from ...circuits.similarity import length
from ...data.groups import group_labels
from .settings import CUDSettings

PENALTIES = np.logspace(-3, 4, 15)


def anchor_circuit(edges: Tensor, *, raw: bool = False) -> Tensor:
    """Mean of the samples' edge scores, `raw` or after scaling each to unit length, `[E]` from `[n, E]`."""
    if raw:
        return edges.mean(0)
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
    assert settings.selection is not None
    k = settings.edges_kept
    mask = select_circuits(
        edges, graph, selection="all" if k is None else settings.selection, k=k, prune=bool(settings.prune)
    )
    return mask.to(edges) if kind == "binary" else circuit_vectors(edges * mask, kind=kind)


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
        to_easy = distance(circuits, vectors(anchor_circuit(easy, raw=settings.raw_anchors)[None]), settings.distance)
        to_hard = distance(circuits, vectors(anchor_circuit(hard, raw=settings.raw_anchors)[None]), settings.distance)
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
    train_blocks, test_blocks = [], []
    for values, others in zip(train, test, strict=True):
        mean, deviation = values.mean(0), values.std(0)
        scale = np.where(deviation > 1e-6, deviation, np.inf) * np.sqrt(max(1, int((deviation > 1e-6).sum())))
        train_blocks.append((values - mean) / scale)
        test_blocks.append((others - mean) / scale)
    design = np.concatenate(train_blocks, axis=1)
    # A rotation onto the samples' own span leaves a ridge fit as it is, and makes it cheap.
    _, _, axes = np.linalg.svd(design, full_matrices=False)
    target = (rankdata(residual) - 0.5) / len(residual)
    folds = None
    names = [] if groups is None else group_labels(groups)
    if len(set(names)) >= 3:
        folds = list(GroupKFold(min(5, len(set(names)))).split(design, groups=names))
    fit = RidgeCV(alphas=PENALTIES, cv=folds).fit(design @ axes.T, target)
    return fit.predict(np.concatenate(test_blocks, axis=1) @ axes.T)

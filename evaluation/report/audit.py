"""Sections of `results.json`: what is left of the forget set by difficulty, and how well difficulty predicted it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cud_trainer.circuits import CircuitTable, Faithfulness, circuit_signature, select_circuits

from .. import statistics as stats

# How the metrics are called in reports, and whether they are trivial (no circuit needed).
LABELS = {
    "cud": ("CUD", "circuit"),
    "cud_paper": ("CUD, top 200 edges by cosine (cud_paper)", "circuit"),
    "circuit_mass": ("circuit mass", "circuit"),
    "loss": ("initial log-probability", "trivial"),
    "length": ("answer length", "trivial"),
}
TRIVIAL = ("loss", "length")
CIRCUIT_EDGES = 200


def shown(interval: dict[str, Any]) -> str:
    """A figure with its interval as text, `0.712 [0.601, 0.803]`; `n/a` where it is undefined."""
    value, low, high = interval["value"], interval["low"], interval["high"]
    return "n/a" if value is None or not np.isfinite(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def means(values: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Mean over samples of every metric, with its bootstrap interval."""
    return {name: stats.bootstrap_mean(column, seed=seed).as_dict() for name, column in values.items()}


def by_bucket(values: dict[str, np.ndarray], bucket: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """One row per difficulty bucket, 1 = easiest: its size and the mean of every metric with its interval."""
    rows = []
    for number in range(int(bucket.max()) + 1):
        inside = bucket == number
        part = {name: column[inside] for name, column in values.items()}
        rows.append({"bucket": number + 1, "n": int(inside.sum()), **means(part, seed)})
    return rows


def difficulty_section(
    objective: str,
    columns: dict[str, np.ndarray],
    residuals: Sequence[np.ndarray],
    *,
    target: str,
    seed: int,
) -> dict[str, Any]:
    """How well each metric predicts residual memorisation.

    Args:
        columns: metric name -> score of every forget sample, `[N]`, higher = harder; must contain loss and length.
        residuals: residual memorisation of every sample, one array `[N]` per unlearning seed.
        target: what `residuals` is, in words.
    """
    target_values = np.mean(residuals, axis=0)
    controls = np.column_stack([columns[name] for name in TRIVIAL])
    rows = []
    for name, values in columns.items():
        label, kind = LABELS.get(name, (name, "circuit"))
        row: dict[str, Any] = {"metric": name, "label": label, "kind": kind}
        row["spearman"] = stats.spearman(values, target_values, seed=seed).as_dict()
        row["partial"] = (
            None if name in TRIVIAL else stats.partial_spearman(values, target_values, controls, seed=seed).as_dict()
        )
        # Counting pairs is slow: fewer draws.
        row["kendall"] = stats.kendall(values, target_values, seed=seed, n_boot=200).as_dict()
        row["auroc"] = stats.auroc_extremes(values, target_values, seed=seed).as_dict()
        rows.append(row)
    section: dict[str, Any] = {"objective": objective, "n": len(target_values), "target": target, "rows": rows}
    if len(residuals) > 1:
        section["ceiling"] = {**stats.ceiling(np.stack(residuals), seed=seed), "n_seeds": len(residuals)}
    return section


def averaged_residual(
    forget: Sequence[np.ndarray], window: tuple[float, float] = (0.15, 0.75)
) -> tuple[np.ndarray, list[int]]:
    """Residual memorisation of a run: mean over the snapshots at which the mean forget probability is inside `window`
    (shares of the first snapshot's), and which snapshots these are. Falls back to the one closest to the middle."""
    shares = np.array([snapshot.mean() for snapshot in forget]) / forget[0].mean()
    used = [i for i, share in enumerate(shares) if window[0] <= share <= window[1]]
    if not used:
        used = [int(np.argmin(np.abs(shares - sum(window) / 2)))]
    return np.mean([forget[i] for i in used], axis=0), used


def spearman_difference(
    a: np.ndarray, b: np.ndarray, target: np.ndarray, *, seed: int, n_boot: int = 2000
) -> stats.Interval:
    """Spearman of `a` with `target` minus that of `b`, with a paired bootstrap interval over samples, 95%."""
    from scipy.stats import spearmanr

    def difference(rows: np.ndarray) -> float:
        return spearmanr(a[rows], target[rows]).statistic - spearmanr(b[rows], target[rows]).statistic

    generator = np.random.default_rng(seed)
    size = len(target)
    draws = [difference(generator.integers(0, size, size)) for _ in range(n_boot)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return stats.Interval(difference(np.arange(size)), float(low), float(high))


def matched_position(utility: np.ndarray, residual: np.ndarray, level: float) -> float | None:
    """Where on a run's path the residual is lowest while utility is at least `level`; `None` if it never is.

    Args:
        utility, residual: along the path, `[T]`. Between two snapshots the path is a straight line, so that the point
            may lie on a crossing of the level.

    Returns:
        A position in [0, T - 1]; its fraction is that between two snapshots.
    """
    candidates = [float(i) for i in np.flatnonzero(utility >= level)]
    for i in range(len(utility) - 1):
        if (utility[i] - level) * (utility[i + 1] - level) < 0:
            candidates.append(i + (utility[i] - level) / (utility[i] - utility[i + 1]))
    if not candidates:
        return None
    return min(candidates, key=lambda position: float(at_position(residual, position)))


def at_position(values: np.ndarray, position: float) -> np.ndarray:
    """`values [T, ...]` at a fractional position along the first axis, by linear interpolation."""
    values = np.asarray(values, dtype=float)
    before = int(position)
    after = min(before + 1, len(values) - 1)
    return values[before] + (position - before) * (values[after] - values[before])


def strongest_edges(table: CircuitTable, k: int = CIRCUIT_EDGES) -> torch.Tensor:
    """The circuits that the report is about: the `k` edges (all, if there are fewer) with the largest |score|."""
    return select_circuits(table.edges, table.graph, selection="top_k", k=min(k, table.graph.n_edges))


def signature_of(table: CircuitTable, k: int = CIRCUIT_EDGES) -> dict[str, np.ndarray]:
    """Signature of the circuits that the report is about, each `[N]`; NaN for empty circuits."""
    found = circuit_signature(table.edges, table.graph, strongest_edges(table, k))
    return {name: values.numpy() for name, values in found.items()}


def circuit_section(
    table: CircuitTable,
    bucket: np.ndarray,
    residual: np.ndarray | None,
    *,
    seed: int,
    note: str,
    k: int = CIRCUIT_EDGES,
    shown_edges: int = 150,
    kept: Faithfulness | None = None,
) -> dict[str, Any]:
    """Where the circuits of easy and hard samples lie: their signature by bucket, and the edges that tell them apart.

    Args:
        table: edge scores of the forget samples, `N`.
        bucket: difficulty bucket of each sample, 0 = easiest, `[N]`.
        residual: what is left of each sample, `[N]`, if it is known.
        note: whose buckets and whose residual these are, in words.
        k: edges of a circuit (top-k by |score|).
        shown_edges: how many edges the pictures show.
        kept: faithfulness of the circuits that `strongest_edges` gives, on the model they were taken from.
    """
    circuits = strongest_edges(table, k)
    empty = ~circuits.any(1)
    signature = signature_of(table, k)
    if kept is not None:
        signature["faithfulness"] = kept.share.double().numpy()
        signature["faithfulness_of_random_edges"] = kept.random_share.double().mean(0).numpy()
    full = ~empty.numpy()
    edges = table.edges.double()
    unit = edges / torch.linalg.vector_norm(edges, dim=1, keepdim=True).clamp(min=torch.finfo(edges.dtype).tiny)
    easy, hard = (torch.from_numpy((bucket == side) & full) for side in (0, int(bucket.max())))
    difference = unit[hard].abs().mean(0) - unit[easy].abs().mean(0)
    section: dict[str, Any] = {
        "n": len(table.ids),
        "n_empty": int(empty.sum()),
        "k": min(k, table.graph.n_edges),
        "note": note,
        "settings": table.settings,
        "layers": table.graph.n_layers,
        "heads": table.graph.n_heads,
        "kv_heads": table.graph.n_kv_heads,
        "signature": list(signature),
        "buckets": by_bucket({name: values[full] for name, values in signature.items()}, bucket[full], seed),
        "mean_circuit": _strongest(unit[full].mean(0), table, shown_edges),
        "difference": _strongest(difference, table, shown_edges),
    }
    if residual is not None:
        section["spearman"] = [
            {"name": name, "spearman": stats.spearman(signature[name][full], residual[full], seed=seed).as_dict()}
            for name in signature
        ]
    return section


def _strongest(values: torch.Tensor, table: CircuitTable, count: int) -> list[dict[str, Any]]:
    """The edges with the largest absolute values, strongest first."""
    places = table.graph.mask.nonzero()
    order = values.abs().argsort(descending=True, stable=True)[:count].tolist()
    return [
        {
            "source": table.graph.sources[int(places[edge, 0])],
            "destination": table.graph.destinations[int(places[edge, 1])],
            "value": float(values[edge]),
        }
        for edge in order
        if float(values[edge]) != 0
    ]

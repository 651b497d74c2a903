"""Where the circuits of easy and hard samples lie, and whether they are what the CUD paper found."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cud_trainer.circuits import CircuitTable, Faithfulness, circuit_signature, select_circuits
from cud_trainer.difficulty import Buckets

from .. import statistics as stats
from ..statistics import Interval
from .cells import Cell, mean, missing
from .schema import BucketRow, Circuits, EdgeRow, SignatureCorrelation, Table
from .tables import bucket_rows, table

CIRCUIT_EDGES = 200
# What Cheng et al. 2026 found of hard samples: longer, deeper and later circuits.
MECHANISMS = ("mean_edge_length", "mean_destination_depth", "late_share")


def strongest_edges(table: CircuitTable, k: int = CIRCUIT_EDGES) -> torch.Tensor:
    """The circuits that the report is about: the `k` edges (all, if there are fewer) with the largest |score|."""
    return select_circuits(table.edges, table.graph, selection="top_k", k=min(k, table.graph.n_edges))


def signature_of(table: CircuitTable, k: int = CIRCUIT_EDGES) -> dict[str, np.ndarray]:
    """Signature of the circuits that the report is about, each `[N]`; NaN for empty circuits."""
    signature = circuit_signature(table.edges, table.graph, strongest_edges(table, k))
    return {name: values.numpy() for name, values in signature.items()}


def circuit_section(
    table: CircuitTable,
    buckets: Buckets,
    residual: np.ndarray | None,
    *,
    seed: int,
    note: str,
    k: int = CIRCUIT_EDGES,
    shown_edges: int = 150,
    faithfulness: Faithfulness | None = None,
) -> Circuits:
    """Where the circuits of easy and hard samples lie: their signature by bucket, and the edges that tell them apart.

    Args:
        table: edge scores of the forget samples, `N`.
        buckets: of the forget samples.
        residual: what is left of each sample, `[N]`, if it is known.
        note: whose buckets and whose residual these are, in words.
        k: edges of a circuit (top-k by |score|).
        shown_edges: how many edges the pictures show.
        faithfulness: of the circuits that `strongest_edges` gives, on the model they were taken from.
    """
    circuits = strongest_edges(table, k)
    empty = ~circuits.any(1)
    signature = signature_of(table, k)
    if faithfulness is not None:
        signature["faithfulness"] = faithfulness.share.double().numpy()
        signature["faithfulness_of_random_edges"] = faithfulness.random_share.double().mean(0).numpy()
    full = ~empty.numpy()
    edges = table.edges.double()
    unit = edges / torch.linalg.vector_norm(edges, dim=1, keepdim=True).clamp(min=torch.finfo(edges.dtype).tiny)
    easy, hard = (torch.from_numpy(mask & full) for mask in (buckets.easiest, buckets.hardest))
    difference = unit[hard].abs().mean(0) - unit[easy].abs().mean(0)
    whole = {name: values[full] for name, values in signature.items()}
    section = Circuits(
        n=len(table.ids),
        n_empty=int(empty.sum()),
        k=min(k, table.graph.n_edges),
        note=note,
        settings=table.settings,
        layers=table.graph.n_layers,
        heads=table.graph.n_heads,
        kv_heads=table.graph.n_kv_heads,
        signature=list(signature),
        buckets=bucket_rows(BucketRow, whole, buckets.select(full), seed),
        mean_circuit=_strongest(unit[full].mean(0), table, shown_edges),
        difference=_strongest(difference, table, shown_edges),
    )
    if residual is not None:
        section.spearman = [
            SignatureCorrelation(name=name, spearman=stats.spearman(values, residual[full], seed=seed))
            for name, values in whole.items()
        ]
    return section


def _strongest(values: torch.Tensor, table: CircuitTable, count: int) -> list[EdgeRow]:
    """The edges with the largest absolute values, strongest first."""
    places = table.graph.mask.nonzero()
    order = values.abs().argsort(descending=True, stable=True)[:count].tolist()
    return [
        EdgeRow(
            source=table.graph.sources[int(places[edge, 0])],
            destination=table.graph.destinations[int(places[edge, 1])],
            value=float(values[edge]),
        )
        for edge in order
        if float(values[edge]) != 0
    ]


def mechanism_table(
    signature: Mapping[str, np.ndarray], buckets: Buckets, seed: int, n_boot: int = 2000
) -> tuple[Table, str]:
    """Are the circuits of hard samples longer, deeper and later, as Cheng et al. (2026) found?

    Effect size: mean of the hardest less mean of the easiest bucket, in pooled standard deviations (Cohen's d), with an
    interval at 1 - 0.05 / 3 (Bonferroni over the three). Yes: at least two intervals lie above 0 and none below; no: at
    least one lies below 0 and none above; undecided otherwise.

    Args:
        signature: `MECHANISMS` of each sample, `[N]`, NaN for empty circuits.
        buckets: of these samples.
    """
    generator = np.random.default_rng(seed)
    rows: list[tuple[str, list[Cell]]] = []
    above = below = 0
    for name in MECHANISMS:
        values = np.asarray(signature[name], dtype=float)
        easy, hard = (np.sort(values[mask & np.isfinite(values)]) for mask in (buckets.easiest, buckets.hardest))
        if min(len(easy), len(hard)) < 2:
            rows.append((name, [missing("fewer than two circuits in a bucket")] * 3))
            continue
        draws = np.array(
            [_cohen(generator.choice(hard, len(hard)), generator.choice(easy, len(easy))) for _ in range(n_boot)]
        )
        effect = _cohen(hard, easy)
        if not np.isfinite(effect) or not np.isfinite(draws).any():
            rows.append((name, [mean(easy, seed), mean(hard, seed), missing("no variance")]))
            continue
        tail = 100 * 0.05 / len(MECHANISMS) / 2
        low, high = np.nanpercentile(draws, [tail, 100 - tail])
        above, below = above + (low > 0), below + (high < 0)
        rows.append((name, [mean(easy, seed), mean(hard, seed), Interval(effect, float(low), float(high))]))
    verdict = "yes" if above >= 2 and not below else "no" if below and not above else "undecided"
    note = (
        "Effect size: hardest less easiest bucket in pooled standard deviations, interval at 98.3% (three at once). "
        "Yes: two or more above 0, none below; no: one or more below 0, none above; else undecided."
    )
    finding = f"hard samples have longer, deeper and later circuits, as the CUD paper found: {verdict}"
    return table("mechanisms", "Mechanisms", note, ["easiest bucket", "hardest bucket", "effect size"], rows), finding


def _cohen(a: np.ndarray, b: np.ndarray) -> float:
    pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
    return float((a.mean() - b.mean()) / pooled) if pooled > 1e-12 else float("nan")

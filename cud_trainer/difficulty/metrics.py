"""The difficulty metrics and their registry. Each returns one value per forget sample; higher = harder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..files import check_new_file
from ..options import check_known
from .anchors import AnchorBank
from .context import DifficultyContext
from .cud import CUDSettings, circuits_of, cud_scores, extremes, log_standardisation


@dataclass(frozen=True)
class Metric:
    """A registered difficulty metric.

    Attributes:
        name: the name used in configs.
        compute: `(context, **options) -> float [N]`.
        needs_circuits: whether it reads edge scores (and so needs a supported architecture).
        cross_fitted: whether a sample's score depends on folds of the others.
    """

    name: str
    compute: Callable[..., np.ndarray]
    needs_circuits: bool = False
    cross_fitted: bool = False

    def check_options(self, given: dict[str, Any]) -> None:
        """Raise `ValueError` for an option this metric does not have, or a value it cannot have."""
        if not isinstance(given, dict):
            raise ValueError(f"options of difficulty metric {self.name!r} must be a dictionary, got {given!r}")
        check_known(f"difficulty metric {self.name!r}", self.compute, given)
        if self.compute is cud:
            cud_settings(**given)


METRICS: dict[str, Metric] = {}


def register_metric(name: str, **properties: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a difficulty metric under `name`; `properties` are those of `Metric`. `ValueError` if taken."""

    def register(compute: Callable[..., Any]) -> Callable[..., Any]:
        if name in METRICS:
            raise ValueError(f"difficulty metric {name!r} is already registered")
        METRICS[name] = Metric(name, compute, **properties)
        return compute

    return register


@register_metric("loss")
def loss(context: DifficultyContext) -> np.ndarray:
    """Mean answer log-probability (minus the loss) on the original model: what is known best is hardest to lose."""
    return context.answers[0]


@register_metric("length")
def length(context: DifficultyContext) -> np.ndarray:
    """Number of answer tokens: the other trivial baseline."""
    return context.answers[1]


@register_metric("circuit_mass", needs_circuits=True)
def circuit_mass(context: DifficultyContext) -> np.ndarray:
    """`-log(sum of |edge score|)`: a saturated answer moves little whatever edge is cut, and is hard to unlearn.

    Raises:
        ValueError: for a sample whose edges all score 0.
    """
    mass = context.edges.double().abs().sum(1)
    empty = (mass == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"the circuit of sample {context.forget['sample_id'][empty[0]]!r} is empty: all edges score 0")
    return -mass.log().numpy()


def cud_settings(
    variant: str = "log",
    vector: str | None = None,
    k: int | str | None = None,
    distance: str | None = None,
    anchor_share: float = 0.25,
    selection: str = "top_k",
    prune: bool = False,
    **_: Any,
) -> CUDSettings:
    """The part of the `cud` metric's options that says how circuits are compared."""
    return CUDSettings(variant, vector, k, distance, anchor_share, selection, prune)


@register_metric("cud", needs_circuits=True, cross_fitted=True)
def cud(
    context: DifficultyContext,
    *,
    variant: str = "log",
    vector: str | None = None,
    k: int | str | None = None,
    distance: str | None = None,
    anchor_share: float = 0.25,
    selection: str = "top_k",
    prune: bool = False,
    anchors: Any = "calibration",
    save_anchors: str | None = None,
) -> np.ndarray:
    """Circuit-guided unlearning difficulty (see `cud_trainer.difficulty.cud`), in [0, 1].

    Cross-fitted: the anchors that score a sample are made without it and without the rest of its fold.

    Args:
        variant, vector, k, distance, anchor_share, selection, prune: see `CUDSettings`.
        anchors: `"calibration"` (the samples a short unlearning run leaves least and most memorised), a dict
            `{"easy": [ids], "hard": [ids]}` of forget samples, or the path of a saved anchor bank.
        save_anchors: write the anchor bank of the whole forget set to this path (not with a bank as `anchors`).

    Raises:
        ValueError: for unknown options or ids, a bank of another graph, or an undefined score (an empty circuit),
            naming the sample.
    """
    settings = cud_settings(variant, vector, k, distance, anchor_share, selection, prune)
    ids = list(context.forget["sample_id"])
    # Cheap checks of the user's input come before the circuits.
    chosen = _anchor_rows(anchors, ids) if isinstance(anchors, dict) else None
    bank = AnchorBank.load(anchors) if isinstance(anchors, str) and anchors != "calibration" else None
    if save_anchors is not None:
        if bank is not None:
            raise ValueError(f"save_anchors has nothing new to save: the anchors are those of {anchors}")
        check_new_file(save_anchors, overwrite=False)
    if not isinstance(anchors, (str, dict)):
        raise ValueError(f"anchors must be 'calibration', a dict of easy and hard ids or a path, got {anchors!r}")
    fold = context.fold
    tests = [np.flatnonzero(fold == held_out) for held_out in np.unique(fold)]
    if bank is not None:
        bank.check(context.graph.fingerprint, context.circuit_settings)
        for test in tests:
            bank.without({ids[row] for row in test})
    elif chosen is not None:
        for test in tests:
            _choose(np.setdiff1d(np.arange(len(ids)), test), chosen, context, settings)

    edges = context.edges
    scores = np.full(len(ids), np.nan)
    for test in tests:
        if bank is not None:
            easy, hard = bank.without({ids[row] for row in test})
            standardisation: tuple[torch.Tensor, torch.Tensor] | None = (bank.mean, bank.deviation)
        else:
            rows = np.setdiff1d(np.arange(len(ids)), test)
            easy_rows, hard_rows = _choose(rows, chosen, context, settings)
            easy, hard = edges[easy_rows], edges[hard_rows]
            standardisation = log_standardisation(edges[rows]) if settings.vector == "log" else None
        scores[test] = cud_scores(edges[test], easy, hard, settings, standardisation, context.graph)

    if settings.vector != "log":
        empty = (circuits_of(edges, settings, context.graph) == 0).all(1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(ids)} samples have an empty circuit, the first is {ids[empty[0]]!r}: CUD is "
                "undefined for them; use more edges (k), no pruning or the 'log' variant"
            )
    undefined = np.flatnonzero(~np.isfinite(scores))
    if undefined.size:
        raise ValueError(
            f"CUD is undefined for {undefined.size} of {len(ids)} samples, the first is {ids[undefined[0]]!r} (its "
            "circuit equals both anchors, or an anchor circuit is empty); use more edges (k) or the 'log' variant"
        )
    if save_anchors is not None:
        _make_bank(context, chosen, settings, ids).save(save_anchors)
    return scores


@register_metric("cud_paper", needs_circuits=True, cross_fitted=True)
def cud_paper(
    context: DifficultyContext,
    *,
    k: int | str | None = None,
    selection: str = "top_k",
    prune: bool = False,
    anchors: Any = "calibration",
) -> np.ndarray:
    """CUD with the published comparison of circuits: weighted top-k edges, cosine. To be reported beside `cud`."""
    return cud(context, variant="paper", k=k, selection=selection, prune=prune, anchors=anchors)


def _anchor_rows(anchors: dict[str, Any], ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    if set(anchors) != {"easy", "hard"}:
        raise ValueError(f"anchors must have exactly the keys 'easy' and 'hard', got {sorted(anchors)}")
    position = {sample_id: row for row, sample_id in enumerate(ids)}
    rows = []
    for side in ("easy", "hard"):
        unknown = [str(sample_id) for sample_id in anchors[side] if str(sample_id) not in position]
        if unknown:
            raise ValueError(f"{side} anchor {unknown[0]!r} is not a forget sample")
        rows.append(np.array([position[str(sample_id)] for sample_id in anchors[side]], dtype=int))
    if set(rows[0]) & set(rows[1]):
        both = ids[next(iter(set(rows[0]) & set(rows[1])))]
        raise ValueError(f"sample {both!r} is both an easy and a hard anchor")
    return rows[0], rows[1]


def _choose(
    rows: np.ndarray,
    chosen: tuple[np.ndarray, np.ndarray] | None,
    context: DifficultyContext,
    settings: CUDSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Easy and hard anchor samples among `rows`."""
    if chosen is None:
        easy, hard = extremes(context.residual[rows], settings.anchor_share)
        easy, hard = rows[easy], rows[hard]
    else:
        easy, hard = (np.intersect1d(side, rows) for side in chosen)
        if not easy.size or not hard.size:
            raise ValueError("a fold holds all easy or all hard anchors; give more anchor ids or more folds")
    return torch.from_numpy(easy), torch.from_numpy(hard)


def _make_bank(
    context: DifficultyContext,
    chosen: tuple[np.ndarray, np.ndarray] | None,
    settings: CUDSettings,
    ids: list[str],
) -> AnchorBank:
    easy, hard = _choose(np.arange(len(ids)), chosen, context, settings)
    mean, deviation = log_standardisation(context.edges)
    return AnchorBank(
        context.edges[easy],
        context.edges[hard],
        [ids[row] for row in easy.tolist()],
        [ids[row] for row in hard.tolist()],
        mean,
        deviation,
        context.graph.fingerprint,
        dict(context.circuit_settings),
    )

"""The metrics `cud`, `cud_paper` and `cud_top_k`: anchors or a fit from the other folds, a score for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...circuits import Graph
from ...files import check_new_file
from ..context import DifficultyContext
from ..registry import register_metric
from .anchors import agreement, extremes, given_sides
from .bank import AnchorBank, Folds
from .features import blocks, default_features, sample_features
from .formula import calibrated_scores, circuits_of, cud_scores, log_standardisation
from .settings import CIRCUIT_FEATURES, FEATURES, PAPER_CIRCUITS, CUDSettings, checked_features

METHODS = ("ga", "graddiff", "npo", "simnpo")


def _check_cud(owner: str, **options: Any) -> None:
    """Raise `ValueError` for values that options of the `cud` metric cannot have."""
    anchoring = {name: options.pop(name) for name in ("anchors", "methods", "at_least")}
    options.pop("save_anchors", None)
    options["variant"] = _variant(options["variant"], anchoring["anchors"])
    _check_anchors(CUDSettings(**options), **anchoring)


def _variant(variant: str | None, anchors: Any) -> str:
    """The variant asked for, or the one that such anchors can serve."""
    if variant is not None:
        return variant
    return "log" if isinstance(anchors, dict) or anchors == "agreement" else "calibrated"


def _bank_of(anchors: Any) -> AnchorBank | None:
    """The anchor bank that `anchors` are or name, if they do; `ValueError` for a file that is none."""
    if isinstance(anchors, AnchorBank):
        return anchors
    if not isinstance(anchors, str) or anchors in ("calibration", "agreement"):
        return None
    return AnchorBank.load(anchors)


def _needs_circuits(*, variant: str | None, features: Sequence[str] | None, anchors: Any, **others: Any) -> bool:
    """Whether the `cud` metric computes edge scores with these options."""
    if _variant(variant, anchors) != "calibrated":
        return True
    names = checked_features(features)
    if names is None:
        bank = _bank_of(anchors)
        names = FEATURES if bank is None else bank.feature_names
    return any(name in CIRCUIT_FEATURES for name in names)


def _uses_folds(*, anchors: Any, **others: Any) -> bool:
    """Whether it needs folds whatever the samples are: with a bank only those that are in it do."""
    return isinstance(anchors, dict) or anchors in ("calibration", "agreement")


def _check_anchors(settings: CUDSettings, anchors: Any, methods: Sequence[str], at_least: int) -> None:
    if not isinstance(anchors, (str, dict, AnchorBank)):
        raise ValueError(
            f"anchors must be 'calibration', 'agreement', a dict of easy and hard ids or a path, got {anchors!r}"
        )
    if settings.variant == "calibrated" and (isinstance(anchors, dict) or anchors == "agreement"):
        raise ValueError("the CUD variant 'calibrated' is fitted to a calibration run: it has no anchors to be given")
    if isinstance(anchors, str) and anchors == "agreement":
        if isinstance(methods, str) or len(set(methods)) < 2:
            raise ValueError(f"methods must be a list of two or more objectives, got {methods!r}")
        if isinstance(at_least, bool) or not isinstance(at_least, int) or not 1 <= at_least <= len(methods):
            raise ValueError(f"at_least must be from 1 to {len(methods)}, the number of methods, got {at_least!r}")


@register_metric("cud", needs_circuits=_needs_circuits, cross_fitted=_uses_folds, check=_check_cud)
def cud(
    context: DifficultyContext,
    *,
    variant: str | None = None,
    vector: str | None = None,
    k: int | str | None = None,
    distance: str | None = None,
    anchor_share: float = 0.25,
    selection: str | None = None,
    prune: bool | None = None,
    features: Sequence[str] | None = None,
    anchors: Any = "calibration",
    methods: Sequence[str] = METHODS,
    at_least: int = 3,
    save_anchors: str | None = None,
) -> np.ndarray:
    """Circuit-guided unlearning difficulty (see `cud_trainer.difficulty.cud`), in [0, 1]; `"calibrated"` about so.

    Cross-fitted: the anchors (or the fit) that score a sample are made without it and without the rest of its fold.

    Args:
        variant: `"calibrated"`, `"log"`, `"top_k"` or `"paper"`, see `CUDSettings`; by default `"calibrated"`, or
            `"log"` where the anchors are given or agreed on and there is nothing to fit.
        vector: see `CUDSettings`.
        k: see `CUDSettings`.
        distance: see `CUDSettings`.
        anchor_share: see `CUDSettings`.
        selection: see `CUDSettings`.
        prune: see `CUDSettings`.
        features: see `CUDSettings`. Without them, gradients are left out where single samples have none (quantised
            weights), and of an anchor bank all that it has are taken.
        anchors: `"calibration"` (the samples a short unlearning run leaves least and most memorised), `"agreement"`
            (those that several unlearning methods agree on, as in the paper), a dict `{"easy": [ids], "hard": [ids]}`
            of forget samples, or an `AnchorBank` or the path of a saved one, which must be of this model.
        methods: for `"agreement"`: objectives to calibrate with, a run each.
        at_least: for `"agreement"`: how many of them must agree.
        save_anchors: write the anchor bank of the whole forget set to this path (not with a bank as `anchors`).

    Raises:
        ValueError: for unknown options or ids, a bank of another model, or an undefined score (an empty circuit),
            naming the sample.
    """
    variant = _variant(variant, anchors)
    bank = _bank_of(anchors)
    if features is None and variant == "calibrated":
        features = default_features(context) if bank is None else bank.feature_names
    settings = CUDSettings(variant, vector, k, distance, anchor_share, selection, prune, features)  # type: ignore[arg-type]
    _check_anchors(settings, anchors, methods, at_least)
    if settings.variant == "paper" and (bank is not None or save_anchors is not None):
        raise ValueError("the CUD variant 'paper' has circuits of its own, which no anchor bank keeps")
    # Cheap checks of the user's input come before the circuits.
    if save_anchors is not None:
        check_new_file(save_anchors, overwrite=False)
    if bank is not None:
        if save_anchors is not None:
            raise ValueError(f"save_anchors has nothing new to save: the anchors are those of {anchors}")
        scores = _from_bank(context, settings, bank)
    else:
        source, folds = _from_forget_set(context, settings, anchors, methods, at_least)
        score = _fitted if settings.variant == "calibrated" else _compared
        scores = score(context, settings, source, folds)
        if save_anchors is not None:
            _check_defined(scores, context, settings)
            source.bank(context, settings).save(save_anchors)
    _check_defined(scores, context, settings)
    return scores


@dataclass
class _Source:
    """Samples whose difficulty is known: those of the forget set, or of a bank.

    Attributes:
        edges, residual, features: as in `AnchorBank`.
        side: of anchors that are given, as in `AnchorBank`.
        runs: residuals of several methods that must agree, `at_least` of them.
    """

    edges: Tensor | None
    residual: np.ndarray
    features: dict[str, Tensor]
    side: np.ndarray | None = None
    runs: list[np.ndarray] | None = None
    at_least: int = 0

    def anchors(self, rows: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Easy and hard anchor samples among `rows`."""
        if self.runs is not None:
            easy, hard = agreement([run[rows] for run in self.runs], share, self.at_least)
        elif self.side is not None:
            easy, hard = (np.flatnonzero(self.side[rows] == side) for side in (-1, 1))
        else:
            easy, hard = extremes(self.residual[rows], share)
        return rows[easy], rows[hard]

    def bank(self, context: DifficultyContext, settings: CUDSettings) -> AnchorBank:
        """All samples of the forget set, with their anchors. A calibrated fit uses none, but its run has them, too."""
        side = torch.zeros(len(self.residual), dtype=torch.int8)
        for number, rows in zip((-1, 1), self.anchors(np.arange(len(side)), settings.anchor_share), strict=True):
            side[torch.from_numpy(rows)] = number
        compared = settings.features is None
        return AnchorBank.of(context, self.residual, side, settings.features or (), self.features, keep_edges=compared)


def _from_bank(context: DifficultyContext, settings: CUDSettings, bank: AnchorBank) -> np.ndarray:
    """Scores from a bank; samples of the forget set that are in it score the other folds only."""
    names = settings.features or ("edges",)
    if settings.features is not None:
        bank.check_fit(names)
    elif bank.edges is None:
        raise ValueError(f"the anchor bank has no circuits, which the CUD variant {settings.variant!r} compares")
    bank.check_context(context, names)
    folds = bank.folds(context)
    if settings.features is not None:
        return bank.fitted(context, names, folds)
    source = _Source(bank.edges, bank.residual.numpy(), bank.features, side=bank.side.numpy())
    return _compared(context, settings, source, folds)


def _from_forget_set(
    context: DifficultyContext, settings: CUDSettings, anchors: Any, methods: Sequence[str], at_least: int
) -> tuple[_Source, Folds]:
    """The forget set itself, calibrated by one run or by several that must agree, or with anchors given by hand."""
    ids = context.forget.ids
    side = given_sides(anchors, ids) if isinstance(anchors, dict) else None
    folds = [(test, np.setdiff1d(np.arange(len(ids)), test)) for test in _held_out(context)]
    if side is not None and any(not {-1, 1} <= set(side[rows]) for _, rows in folds):
        raise ValueError("a fold holds all easy or all hard anchors; give more anchor ids or more folds")
    runs = [context.residual_of(name) for name in methods] if anchors == "agreement" else None
    residual = context.residual if anchors == "calibration" else np.full(len(ids), np.nan)
    names = settings.features or ()
    features = sample_features(context, names)
    edges = _circuits(context, settings)[0] if "edges" in names or settings.features is None else None
    return _Source(edges, residual, features, side=side, runs=runs, at_least=at_least), folds


def _held_out(context: DifficultyContext) -> list[np.ndarray]:
    """Rows of each fold."""
    return [np.flatnonzero(context.fold == fold) for fold in np.unique(context.fold)]


def _fitted(context: DifficultyContext, settings: CUDSettings, source: _Source, folds: Folds) -> np.ndarray:
    """Scores by a fit to the other samples' residual memorisation, `[N]`."""
    made, groups = blocks(source.edges, source.features, settings.features or ()), context.groups
    scores = np.full(len(context.forget), np.nan)
    for test, rows in folds:
        scores[test] = calibrated_scores(
            [block[rows] for block in made],
            source.residual[rows],
            [block[test] for block in made],
            None if groups is None else [groups[row] for row in rows],
        )
    return scores


def _compared(context: DifficultyContext, settings: CUDSettings, source: _Source, folds: Folds) -> np.ndarray:
    """Scores by the distances to the source's anchors, `[N]`."""
    assert source.edges is not None
    edges, graph = _circuits(context, settings)
    scores = np.full(len(context.forget), np.nan)
    for test, rows in folds:
        easy, hard = source.anchors(rows, settings.anchor_share)
        standardisation = log_standardisation(source.edges[rows]) if settings.vector == "log" else None
        scores[test] = cud_scores(edges[test], source.edges[easy], source.edges[hard], settings, standardisation, graph)
    return scores


def _circuits(context: DifficultyContext, settings: CUDSettings) -> tuple[Tensor, Graph]:
    """Edge scores and graph that a variant compares: those of the run, but for the score as published."""
    return context.circuits(PAPER_CIRCUITS if settings.variant == "paper" else None)


def _check_defined(scores: np.ndarray, context: DifficultyContext, settings: CUDSettings) -> None:
    """Raise `ValueError` naming the first sample without a score."""
    ids = context.forget.ids
    if settings.vector != "log":
        edges, graph = _circuits(context, settings)
        empty = (circuits_of(edges, settings, graph) == 0).all(1).nonzero().flatten().tolist()
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


def _check_paper(owner: str, **options: Any) -> None:
    _check_cud(owner, variant="paper", **options)


def _check_top_k(owner: str, **options: Any) -> None:
    _check_cud(owner, variant="top_k", **options)


@register_metric("cud_paper", needs_circuits=True, cross_fitted=True, check=_check_paper)
def cud_paper(
    context: DifficultyContext,
    *,
    k: int | str | None = None,
    prune: bool | None = None,
    anchors: Any = "calibration",
    methods: Sequence[str] = METHODS,
    at_least: int = 3,
    anchor_share: float = 0.25,
) -> np.ndarray:
    """CUD as published (Cheng et al. 2026, arXiv 2601.09624), in [0, 1], with cross-fitted anchors. To be reported.

    Exact node-wise interpolation in 5 steps with the zero baseline, key and value heads once per query head, whatever
    `circuit_args` say: (1 + 2 layers) 5 backward passes, of which those through the layers before a node are saved; 75
    edges (`k`) chosen greedily from the logits up and pruned; binary vectors; anchors that are the circuit of the raw
    mean. The authors' anchors are 50 easy and 50 hard samples of 400 that 3 of 5 methods agree on: that is
    `anchors="agreement"` with `anchor_share=0.125` and `methods` of your choice.

    Raises:
        ValueError: as `cud`; for an empty circuit, where the authors' code says 0.5.
    """
    return cud(
        context,
        variant="paper",
        k=k,
        prune=prune,
        anchors=anchors,
        methods=methods,
        at_least=at_least,
        anchor_share=anchor_share,
    )


@register_metric("cud_top_k", needs_circuits=True, cross_fitted=True, check=_check_top_k)
def cud_top_k(
    context: DifficultyContext,
    *,
    k: int | str | None = None,
    selection: str = "top_k",
    prune: bool = False,
    anchors: Any = "calibration",
    methods: Sequence[str] = METHODS,
    at_least: int = 3,
    anchor_share: float = 0.25,
) -> np.ndarray:
    """CUD's formula on the 200 strongest edges with their signs, cosine: inspired by the paper, not as published.

    One-pass EAP (by default) and cross-fitted anchors that are means of circuits scaled to unit length. Scores that
    earlier versions call `cud_paper` are this.
    """
    return cud(
        context,
        variant="top_k",
        k=k,
        selection=selection,
        prune=prune,
        anchors=anchors,
        methods=methods,
        at_least=at_least,
        anchor_share=anchor_share,
    )

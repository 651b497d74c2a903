"""The metrics `cud` and `cud_paper`: anchors or a fit from everyone else's fold, a score for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...circuits import circuit_vectors
from ...files import check_new_file
from ...models.matrices import gradients_by_sample
from ..context import DifficultyContext
from ..registry import register_metric
from .anchors import AnchorBank, agreement, extremes, given_sides
from .formula import calibrated_scores, circuits_of, cud_scores, log_standardisation
from .settings import FEATURES, CUDSettings

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


def _check_anchors(settings: CUDSettings, anchors: Any, methods: Sequence[str], at_least: int) -> None:
    if not isinstance(anchors, (str, dict)):
        raise ValueError(
            f"anchors must be 'calibration', 'agreement', a dict of easy and hard ids or a path, got {anchors!r}"
        )
    if settings.variant == "calibrated" and (isinstance(anchors, dict) or anchors == "agreement"):
        raise ValueError("the CUD variant 'calibrated' is fitted to a calibration run: it has no anchors to be given")
    if anchors == "agreement":
        if isinstance(methods, str) or len(set(methods)) < 2:
            raise ValueError(f"methods must be a list of two or more objectives, got {methods!r}")
        if isinstance(at_least, bool) or not isinstance(at_least, int) or not 1 <= at_least <= len(methods):
            raise ValueError(f"at_least must be from 1 to {len(methods)}, the number of methods, got {at_least!r}")


@register_metric("cud", needs_circuits=True, cross_fitted=True, check=_check_cud)
def cud(
    context: DifficultyContext,
    *,
    variant: str | None = None,
    vector: str | None = None,
    k: int | str | None = None,
    distance: str | None = None,
    anchor_share: float = 0.25,
    selection: str = "top_k",
    prune: bool = False,
    features: Sequence[str] | None = None,
    anchors: Any = "calibration",
    methods: Sequence[str] = METHODS,
    at_least: int = 3,
    save_anchors: str | None = None,
) -> np.ndarray:
    """Circuit-guided unlearning difficulty (see `cud_trainer.difficulty.cud`), in [0, 1]; `"calibrated"` about so.

    Cross-fitted: the anchors (or the fit) that score a sample are made without it and without the rest of its fold.

    Args:
        variant: `"calibrated"`, `"log"` or `"paper"`, see `CUDSettings`; by default `"calibrated"`, or `"log"` where
            the anchors are given or agreed on and there is nothing to fit.
        vector: see `CUDSettings`.
        k: see `CUDSettings`.
        distance: see `CUDSettings`.
        anchor_share: see `CUDSettings`.
        selection: see `CUDSettings`.
        prune: see `CUDSettings`.
        features: see `CUDSettings`. Without them, gradients are left out where single samples have none (quantised
            weights).
        anchors: `"calibration"` (the samples a short unlearning run leaves least and most memorised), `"agreement"`
            (those that several unlearning methods agree on, as in the paper), a dict `{"easy": [ids], "hard": [ids]}`
            of forget samples, or the path of a saved anchor bank.
        methods: for `"agreement"`: objectives to calibrate with, a run each.
        at_least: for `"agreement"`: how many of them must agree.
        save_anchors: write the anchor bank of the whole forget set to this path (not with a bank as `anchors`).

    Raises:
        ValueError: for unknown options or ids, a bank of another graph, or an undefined score (an empty circuit),
            naming the sample.
    """
    variant = _variant(variant, anchors)
    if features is None and variant == "calibrated" and not gradients_by_sample(context.model):
        # quantised weights (QLoRA) and fused experts have no gradient of single samples
        features = [name for name in FEATURES if name != "gradients"]
    settings = CUDSettings(variant, vector, k, distance, anchor_share, selection, prune, features)  # type: ignore[arg-type]
    _check_anchors(settings, anchors, methods, at_least)
    # Cheap checks of the user's input come before the circuits.
    if save_anchors is not None:
        check_new_file(save_anchors, overwrite=False)
    if isinstance(anchors, str) and anchors not in ("calibration", "agreement"):
        if save_anchors is not None:
            raise ValueError(f"save_anchors has nothing new to save: the anchors are those of {anchors}")
        source, folds = _from_bank(context, settings, anchors)
    else:
        source, folds = _from_forget_set(context, settings, anchors, methods, at_least)
    score = _fitted if settings.variant == "calibrated" else _compared
    scores = score(context, settings, source, folds)
    _check_defined(scores, context, settings)
    if save_anchors is not None:
        source.bank(context, settings.anchor_share).save(save_anchors)
    return scores


@dataclass
class _Source:
    """Samples whose difficulty is known: those of the forget set, or of a bank.

    Attributes:
        edges, residual, features: as in `AnchorBank`.
        side: of anchors that are given, as in `AnchorBank`.
        runs: residuals of several methods that must agree, `at_least` of them.
    """

    edges: Tensor
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

    def bank(self, context: DifficultyContext, share: float) -> AnchorBank:
        """All samples of the forget set, with their anchors. A calibrated fit uses none, but its run has them, too."""
        side = torch.zeros(len(self.residual), dtype=torch.int8)
        for number, rows in zip((-1, 1), self.anchors(np.arange(len(side)), share), strict=True):
            side[torch.from_numpy(rows)] = number
        return AnchorBank(
            context.forget.ids,
            self.edges,
            torch.from_numpy(self.residual),
            side,
            context.graph.fingerprint,
            dict(context.circuit_settings),
            self.features,
        )


# For each fold, the rows of the forget set that it scores and the rows of the source that score them.
Folds = list[tuple[np.ndarray, np.ndarray]]


def _from_bank(context: DifficultyContext, settings: CUDSettings, path: str) -> tuple[_Source, Folds]:
    """A saved bank; samples of the forget set that are in it score the other folds only."""
    bank = AnchorBank.load(path)
    bank.check(context.graph.fingerprint, context.circuit_settings)
    _check_bank(bank, settings, path)
    ids = context.forget.ids
    folds = [(test, bank.without({ids[row] for row in test})) for test in _held_out(context)]
    return _Source(bank.edges, bank.residual.numpy(), bank.features, side=bank.side.numpy()), folds


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
    features = _features(context, settings)
    return _Source(context.edges, residual, features, side=side, runs=runs, at_least=at_least), folds


def _held_out(context: DifficultyContext) -> list[np.ndarray]:
    """Rows of each fold."""
    return [np.flatnonzero(context.fold == fold) for fold in np.unique(context.fold)]


def _fitted(context: DifficultyContext, settings: CUDSettings, source: _Source, folds: Folds) -> np.ndarray:
    """Scores by a fit to the source's residual memorisation, `[N]`."""
    features = _features(context, settings)
    blocks = _blocks(context.edges, features, settings)
    one_set = source.edges is context.edges  # else a bank, whose samples have no groups here
    source_blocks = blocks if one_set else _blocks(source.edges, source.features, settings)
    groups = context.groups if one_set else None
    scores = np.full(len(context.forget), np.nan)
    for test, rows in folds:
        scores[test] = calibrated_scores(
            [block[rows] for block in source_blocks],
            source.residual[rows],
            [block[test] for block in blocks],
            None if groups is None else [groups[row] for row in rows],
        )
    return scores


def _compared(context: DifficultyContext, settings: CUDSettings, source: _Source, folds: Folds) -> np.ndarray:
    """Scores by the distances to the source's anchors, `[N]`."""
    scores = np.full(len(context.forget), np.nan)
    for test, rows in folds:
        easy, hard = source.anchors(rows, settings.anchor_share)
        standardisation = log_standardisation(source.edges[rows]) if settings.vector == "log" else None
        scores[test] = cud_scores(
            context.edges[test], source.edges[easy], source.edges[hard], settings, standardisation, context.graph
        )
    return scores


def _features(context: DifficultyContext, settings: CUDSettings) -> dict[str, Tensor]:
    """Features beside the edges that a calibrated fit asks for, `[N, p]` each."""
    wanted = settings.features or ()
    features = {}
    if "hidden" in wanted:
        features["hidden"] = context.forget_outputs["hidden"]
    if "gradients" in wanted:
        features["gradients"] = 0.5 * context.gradients["squares"].double().clamp(min=1e-30).log()
    if "outputs" in wanted:
        names = ("mean_logps", "lengths", "margin", "entropy")
        features["outputs"] = torch.stack([context.forget_outputs[name].double() for name in names], 1)
    return features


def _blocks(edges: Tensor, features: dict[str, Tensor], settings: CUDSettings) -> list[np.ndarray]:
    """Blocks of features of all samples, in the order of `settings.features`, float64 `[N, p]` each."""
    by_name = {"edges": circuit_vectors(edges, kind="log"), **features}
    return [by_name[name].double().numpy() for name in settings.features or ()]


def _check_bank(bank: AnchorBank, settings: CUDSettings, path: str) -> None:
    """Raise `ValueError` when the bank lacks what a calibrated fit needs."""
    if settings.variant != "calibrated":
        return
    if not torch.isfinite(bank.residual).all():
        raise ValueError(f"the anchor bank {path} has anchors given by hand: a calibrated fit needs a calibration run")
    lacking = [name for name in settings.features or () if name != "edges" and name not in bank.features]
    if lacking:
        raise ValueError(f"the anchor bank {path} has no features {lacking}; it has {['edges', *bank.features]}")


def _check_defined(scores: np.ndarray, context: DifficultyContext, settings: CUDSettings) -> None:
    """Raise `ValueError` naming the first sample without a score."""
    ids = context.forget.ids
    if settings.vector != "log":
        empty = (circuits_of(context.edges, settings, context.graph) == 0).all(1).nonzero().flatten().tolist()
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


@register_metric("cud_paper", needs_circuits=True, cross_fitted=True, check=_check_paper)
def cud_paper(
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

    The authors take exact node-wise interpolation, 75 greedily chosen edges, binary vectors and anchors that are raw
    means over the scored set; this takes one-pass EAP (by default), top `k`, signed vectors and cross-fitted anchors
    that are means of circuits scaled to unit length. To be reported beside `cud`.
    """
    return cud(
        context,
        variant="paper",
        k=k,
        selection=selection,
        prune=prune,
        anchors=anchors,
        methods=methods,
        at_least=at_least,
        anchor_share=anchor_share,
    )

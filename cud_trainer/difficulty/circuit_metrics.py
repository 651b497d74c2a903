"""Difficulty metrics that read circuits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..circuits import SIGNATURE, circuit_signature, circuit_vectors, select_circuits
from ..files import check_new_file
from ..models.matrices import gradients_by_sample
from .anchors import AnchorBank
from .context import DifficultyContext
from .cud import (
    FEATURES,
    CUDSettings,
    agreement,
    calibrated_scores,
    circuits_of,
    cud_scores,
    extremes,
    log_standardisation,
)
from .registry import register_metric

METHODS = ("ga", "graddiff", "npo", "simnpo")


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


def _check_signature(name: str, k: int) -> None:
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
            f"the circuits of {empty.size} samples are empty, the first is {context.forget['sample_id'][empty[0]]!r}: "
            "they have no signature"
        )
    return values


def check_cud(**options: Any) -> None:
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


@register_metric("cud", needs_circuits=True, cross_fitted=True, check=check_cud)
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
    ids = list(context.forget["sample_id"])
    tests = [np.flatnonzero(context.fold == held_out) for held_out in np.unique(context.fold)]
    # Cheap checks of the user's input come before the circuits.
    if save_anchors is not None:
        check_new_file(save_anchors, overwrite=False)
    if isinstance(anchors, str) and anchors not in ("calibration", "agreement"):
        if save_anchors is not None:
            raise ValueError(f"save_anchors has nothing new to save: the anchors are those of {anchors}")
        bank = AnchorBank.load(anchors)
        bank.check(context.graph.fingerprint, context.circuit_settings)
        _check_bank(bank, settings, anchors)
        known = [bank.without({ids[row] for row in test}) for test in tests]
        features_here = _features(context, settings)
        source = _Source(bank.edges, bank.residual.numpy(), bank.features, side=bank.side.numpy())
    else:
        side = _sides(anchors, ids) if isinstance(anchors, dict) else None
        known = [np.setdiff1d(np.arange(len(ids)), test) for test in tests]
        if side is not None and any(not {-1, 1} <= set(side[rows]) for rows in known):
            raise ValueError("a fold holds all easy or all hard anchors; give more anchor ids or more folds")
        runs = [context.residual_of(name) for name in methods] if anchors == "agreement" else None
        residual = context.residual if anchors == "calibration" else np.full(len(ids), np.nan)
        features_here = _features(context, settings)
        source = _Source(context.edges, residual, features_here, side=side, runs=runs, at_least=at_least)

    scores = np.full(len(ids), np.nan)
    if settings.variant == "calibrated":
        here = _blocks(context.edges, features_here, settings)
        there = here if source.edges is context.edges else _blocks(source.edges, source.features, settings)
        groups = context.groups if there is here else None
        for test, rows in zip(tests, known, strict=True):
            scores[test] = calibrated_scores(
                [block[rows] for block in there],
                source.residual[rows],
                [block[test] for block in here],
                None if groups is None else [groups[row] for row in rows],
            )
    else:
        for test, rows in zip(tests, known, strict=True):
            easy, hard = source.anchors(rows, settings.anchor_share)
            standardisation = log_standardisation(source.edges[rows]) if settings.vector == "log" else None
            scores[test] = cud_scores(
                context.edges[test], source.edges[easy], source.edges[hard], settings, standardisation, context.graph
            )
    _check_defined(scores, context, settings, ids)
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

    edges: torch.Tensor
    residual: np.ndarray
    features: dict[str, torch.Tensor]
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
            list(context.forget["sample_id"]),
            self.edges,
            torch.from_numpy(self.residual),
            side,
            context.graph.fingerprint,
            dict(context.circuit_settings),
            self.features,
        )


def _features(context: DifficultyContext, settings: CUDSettings) -> dict[str, torch.Tensor]:
    """Features beside the edges that a calibrated fit asks for, `[N, p]` each."""
    wanted = settings.features or ()
    found = {}
    if "hidden" in wanted:
        found["hidden"] = context.forget_outputs["hidden"]
    if "gradients" in wanted:
        found["gradients"] = 0.5 * context.gradients["squares"].double().clamp(min=1e-30).log()
    if "outputs" in wanted:
        names = ("mean_logps", "lengths", "margin", "entropy")
        found["outputs"] = torch.stack([context.forget_outputs[name].double() for name in names], 1)
    return found


def _blocks(edges: torch.Tensor, features: dict[str, torch.Tensor], settings: CUDSettings) -> list[np.ndarray]:
    """Blocks of features of all samples, in the order of `settings.features`, float64 `[N, p]` each."""
    found = {"edges": circuit_vectors(edges, kind="log"), **features}
    return [found[name].double().numpy() for name in settings.features or ()]


def _check_bank(bank: AnchorBank, settings: CUDSettings, path: str) -> None:
    """Raise `ValueError` when the bank lacks what a calibrated fit needs."""
    if settings.variant != "calibrated":
        return
    if not torch.isfinite(bank.residual).all():
        raise ValueError(f"the anchor bank {path} has anchors given by hand: a calibrated fit needs a calibration run")
    lacking = [name for name in settings.features or () if name != "edges" and name not in bank.features]
    if lacking:
        raise ValueError(f"the anchor bank {path} has no features {lacking}; it has {['edges', *bank.features]}")


def _check_defined(scores: np.ndarray, context: DifficultyContext, settings: CUDSettings, ids: list[str]) -> None:
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


def _check_paper(**options: Any) -> None:
    check_cud(variant="paper", **options)


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
        context, variant="paper", k=k, selection=selection, prune=prune, anchors=anchors, methods=methods,
        at_least=at_least, anchor_share=anchor_share,
    )  # fmt: skip


def _sides(anchors: dict[str, Any], ids: list[str]) -> np.ndarray:
    """-1 for easy, 1 for hard, 0 for other samples, from ids given by hand."""
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
    sides = np.zeros(len(ids), dtype=int)
    sides[rows[0]], sides[rows[1]] = -1, 1
    return sides

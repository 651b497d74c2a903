"""Anchor banks: what a calibration run showed of one forget request, kept for the next one on the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...data import BATCH_BYTES, Samples
from ...data.groups import group_labels
from ...data.ids import KEYED, PLAIN, IdKey, keyed_for, keys_beside
from ...files import atomic_write, check_new_file
from ...models.fingerprint import model_fingerprint
from ..context import DifficultyContext
from .anchors import extremes
from .features import blocks, default_features, sample_features
from .formula import calibrated_scores
from .settings import ALL_FEATURES, CIRCUIT_FEATURES, CUDSettings, checked_features

HEADER = ("ids", "graph", "settings", "model", "template")

# For each fold, the rows of the forget set that it scores and the rows of the known samples that score them.
Folds = list[tuple[np.ndarray, np.ndarray]]


@dataclass
class AnchorBank:
    """What a calibration run showed of its samples, and what they look like on the original model. Holds no text.

    Attributes:
        ids: sample ids, `n`.
        edges: edge scores, float32 `[n, E]`; `None` in a bank without circuits.
        residual: residual memorisation that the calibration run left, `[n]` in [0, 1], higher = harder; NaN where
            anchors were given by hand.
        side: -1 for samples of the easy anchor, 1 for the hard one, 0 for neither, int8 `[n]`.
        graph: fingerprint of the edge graph; empty without circuits.
        settings: how the edges were scored (method, steps, baseline, metric).
        features: further features of the samples by name, `[n, p]` each, see `cud_trainer.difficulty.cud.FEATURES`.
        model: fingerprint of the original model. Of a file that an earlier version wrote it is empty, and refused.
        groups: number of the group (author, topic) of each sample, `[n]`, without its name; `None` without groups.
        template: hash of the chat template and its options, without the date; empty for samples without one.
        keys: that the ids may be made with, where they come from a file (`cud_trainer.data.ids`).
    """

    ids: list[str]
    edges: Tensor | None
    residual: Tensor
    side: Tensor
    graph: str
    settings: dict[str, Any]
    features: dict[str, Tensor] = field(default_factory=dict)
    model: str = ""
    groups: Tensor | None = None
    template: str = ""
    keys: tuple[IdKey, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        samples: Samples,
        residual: np.ndarray,
        *,
        features: Sequence[str] | None = None,
        groups: Sequence[Any] | None = None,
        circuit_options: dict[str, Any] | None = None,
        anchor_share: float = 0.25,
        batch_size: int | None = None,
        batch_bytes: int = BATCH_BYTES,
        progress: bool = True,
    ) -> AnchorBank:
        """A bank of samples whose residual memorisation is known; the features are computed on `model`.

        Args:
            model: the original model.
            samples: `n` samples, from `prepare_samples`.
            residual: what unlearning left of each, `[n]`, higher = harder, for example that of
                `cud_trainer.scoring.calibrate`. The fit takes its ranks only.
            features: names out of `cud_trainer.difficulty.cud.ALL_FEATURES`; by default `FEATURES`. With `"edges"`
                or `"mass"` circuits are computed, for which the architecture must be described.
            groups: group of each sample: the penalty of the fit is chosen for samples of other groups.
            circuit_options: of `cud_trainer.circuits.edge_attributions`.
            anchor_share: share of the samples that make each anchor, for the variants that compare circuits.
            batch_size: samples per forward pass at most.
            batch_bytes: memory of a batch at most, see `cud_trainer.data.plan_batches`.

        Raises:
            ValueError: for an unknown feature, a residual or groups of another length, or a residual that is not
                finite or the same for all, before anything is computed.
        """
        names = CUDSettings(anchor_share=anchor_share, features=checked_features(features)).features
        residual = np.asarray(residual, dtype=np.float64)
        for name, values in (("residual", residual), ("groups", groups)):
            if values is not None and np.shape(values)[:1] != (len(samples),):
                raise ValueError(f"{name} of shape {list(np.shape(values))} does not fit {len(samples)} samples")
        broken = np.flatnonzero(~np.isfinite(residual))
        if broken.size:
            raise ValueError(f"the residual memorisation of sample {samples.ids[broken[0]]!r} is not finite")
        side = torch.zeros(len(residual), dtype=torch.int8)
        for number, rows in zip((-1, 1), extremes(residual, anchor_share), strict=True):
            side[torch.from_numpy(rows)] = number
        context = DifficultyContext(
            model,
            samples,
            None,
            batch_size=batch_size,
            batch_bytes=batch_bytes,
            groups=None if groups is None else list(groups),
            circuit_options=circuit_options or {},
            progress=progress,
        )
        names = default_features(context) if features is None else names
        assert names is not None
        return cls.of(context, residual, side, names, sample_features(context, names))

    @classmethod
    def of(
        cls,
        context: DifficultyContext,
        residual: np.ndarray,
        side: Tensor,
        names: Sequence[str],
        features: dict[str, Tensor],
        *,
        keep_edges: bool = False,
    ) -> AnchorBank:
        """A bank of the forget set of `context`, with its features `names`; `keep_edges` also without their feature."""
        circuits = keep_edges or any(name in CIRCUIT_FEATURES for name in names)
        numbers = None
        if context.groups is not None:
            labels = group_labels(context.groups)
            order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
            numbers = torch.tensor([order[label] for label in labels])
        return cls(
            list(context.forget.ids),
            context.edges if keep_edges or "edges" in names else None,
            torch.from_numpy(residual),
            side,
            context.graph.fingerprint if circuits else "",
            dict(context.circuit_settings) if circuits else {},
            {name: values.float() for name, values in features.items()},  # as a file keeps them
            model_fingerprint(context.model),
            numbers,
            _template_hash(context),
        )

    def score(
        self,
        model: PreTrainedModel,
        samples: Samples,
        *,
        features: Sequence[str] | None = None,
        folds: int = 5,
        seed: int = 0,
        batch_size: int | None = None,
        batch_bytes: int = BATCH_BYTES,
        progress: bool = True,
    ) -> np.ndarray:
        """Difficulty of the samples of a later request by the calibrated fit, about 0 to 1, higher = harder, `[N]`.

        Nothing is calibrated. Samples that are in the bank are scored without themselves and their fold.

        Args:
            model: the model of the bank.
            samples: `N` samples, prepared as those of the bank were.
            features: what the fit reads, out of `feature_names`; by default all of them.
            folds: of samples that are in the bank, too.
            seed: of these folds.
            batch_size: samples per forward pass at most.
            batch_bytes: memory of a batch at most.

        Raises:
            ValueError: for another model, graph or features than those of the bank, a feature that it does not have,
                or anchors given by hand.
        """
        context = DifficultyContext(
            model,
            samples,
            None,
            batch_size=batch_size,
            batch_bytes=batch_bytes,
            seed=seed,
            folds=folds,
            circuit_options=self.settings,
            progress=progress,
        )
        names = checked_features(features) or self.feature_names
        self.check_fit(names)
        self.check_context(context, names)
        return self.fitted(context, names, self.folds(context))

    def fitted(self, context: DifficultyContext, names: Sequence[str], folds: Folds) -> np.ndarray:
        """Scores of the forget set of `context` by a fit to the residual memorisation of the bank, `[N]`."""
        features = sample_features(context, names)
        for name, values in features.items():
            if values.shape[1] != self.features[name].shape[1]:
                raise ValueError(
                    f"feature {name!r} has {values.shape[1]} numbers here, in the anchor bank "
                    f"{self.features[name].shape[1]}: it was made with other options"
                )
        known = blocks(self.edges, self.features, names)
        asked = blocks(context.edges if "edges" in names else None, features, names)
        scores = np.full(len(context.forget), np.nan)
        for test, rows in folds:
            scores[test] = calibrated_scores(
                [block[rows] for block in known],
                self.residual.numpy()[rows],
                [block[test] for block in asked],
                None if self.groups is None else self.groups.numpy()[rows].tolist(),
            )
        return scores

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features that a fit can read."""
        there = {*self.features, *(() if self.edges is None else ("edges",))}
        return tuple(name for name in ALL_FEATURES if name in there)

    @property
    def easy_ids(self) -> list[str]:
        """Samples of the easy anchor."""
        return [self.ids[row] for row in (self.side == -1).nonzero().flatten().tolist()]

    @property
    def hard_ids(self) -> list[str]:
        """Samples of the hard anchor."""
        return [self.ids[row] for row in (self.side == 1).nonzero().flatten().tolist()]

    @property
    def fingerprint(self) -> str:
        """Hash of all that the bank holds (16 hex digits)."""
        digest = hashlib.sha256(self._header().encode())
        for name, values in sorted(self._tensors().items()):
            digest.update(f"{name}{tuple(values.shape)}".encode())
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _header(self, ids: list[str] | None = None) -> str:
        header = {name: getattr(self, name) for name in HEADER}
        return json.dumps(header if ids is None else {**header, "ids": ids}, sort_keys=True)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"features/{name}": values.float().contiguous() for name, values in self.features.items()}
        tensors |= {"residual": self.residual.double().contiguous(), "side": self.side.to(torch.int8).contiguous()}
        if self.edges is not None:
            tensors["edges"] = self.edges.float().contiguous()
        if self.groups is not None:
            tensors["groups"] = self.groups.long().contiguous()
        return tensors

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a safetensors file, atomically; `ValueError` if it exists."""
        check_new_file(path, overwrite)
        # One entry: of several the library writes them in an order of its own, different every time.
        metadata = {"anchors": self._header(keyed_for(path, self.ids, self.keys))}
        tensors = self._tensors()
        return atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata), private=True)

    @classmethod
    def load(cls, path: str | Path) -> AnchorBank:
        """Read what `save` wrote; `ValueError` for a missing or foreign file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["anchors"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            features = {name.split("/")[1]: tensors.pop(name) for name in list(tensors) if name.startswith("features/")}
            bank = cls(**{"edges": None, **tensors}, **header, features=features, keys=keys_beside(path))
            bank._check_shapes()
            return bank
        except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read an anchor bank from {path}: {str(error)[:300]}") from None

    def _check_shapes(self) -> None:
        """Raise `ValueError` or `TypeError` when a part does not fit the others."""
        count = len(self.ids)
        texts = all(isinstance(text, str) for text in (self.graph, self.model, self.template))
        if not isinstance(self.ids, list) or not texts or not isinstance(self.settings, dict):
            raise ValueError("its header is not that of an anchor bank")
        sized = {"residual": (self.residual, 1), "side": (self.side, 1)}
        sized |= {f"features/{name}": (values, 2) for name, values in self.features.items()}
        for name, optional, dimensions in (("edges", self.edges, 2), ("groups", self.groups, 1)):
            if optional is not None:
                sized[name] = (optional, dimensions)
        unknown = [name for name in self.features if name not in ALL_FEATURES or name == "edges"]
        if unknown:
            raise ValueError(f"unknown feature {unknown[0]!r}")
        for name, (values, dimensions) in sized.items():
            if values.ndim != dimensions or len(values) != count:
                raise ValueError(f"{name} of shape {list(values.shape)} does not fit {count} samples")
            if name != "residual" and not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} holds values that are not finite")

    def check(self, graph: str, settings: dict[str, Any]) -> None:
        """Raise `ValueError` unless circuits with this graph and these settings are comparable to the bank's."""
        if graph != self.graph:
            raise ValueError(f"the anchor bank belongs to a model with another graph ({self.graph}, here {graph})")
        differs = [
            f"{key}: bank {self.settings.get(key)!r}, here {value!r}"
            for key, value in settings.items()
            if self.settings.get(key) != value
        ]
        if differs:
            raise ValueError("the anchor bank was made with other settings: " + "; ".join(differs))

    def check_fit(self, names: Sequence[str]) -> None:
        """Raise `ValueError` when the bank lacks what a fit from the features `names` needs."""
        if not torch.isfinite(self.residual).all():
            raise ValueError("the anchor bank has anchors given by hand: a calibrated fit needs a calibration run")
        lacking = [name for name in names if name not in self.feature_names]
        if lacking or not names:
            raise ValueError(f"the anchor bank has no features {lacking}; it has {list(self.feature_names)}")

    def check_context(self, context: DifficultyContext, names: Sequence[str]) -> None:
        """Raise `ValueError` unless the features `names`, or `"edges"`, of the model of `context` compare to ours."""
        if any(name in CIRCUIT_FEATURES for name in names):
            self.check(context.graph.fingerprint, context.circuit_settings)
        model = model_fingerprint(context.model)
        if not self.model:
            raise ValueError(
                "the anchor bank does not say which model it is of: an earlier version made it, make it again"
            )
        if model != self.model:
            raise ValueError(f"the anchor bank belongs to another model (fingerprint {self.model}, here {model})")
        template = _template_hash(context)
        if template != self.template:
            raise ValueError(
                "the anchor bank's samples were written with another chat template or other options of it "
                f"({self.template or 'none'}, here {template or 'none'})"
            )

    def folds(self, context: DifficultyContext) -> Folds:
        """Rows of the forget set of `context`, and rows of the bank that score them: no sample scores its own fold.

        A request that shares no sample with the bank is scored by all of it.

        Raises:
            ValueError: when what is left of the bank has no anchor.
        """
        ids = context.forget.ids
        if not self._names(set(ids)) & set(self.ids):
            return [(np.arange(len(ids)), np.arange(len(self.ids)))]
        rows = [np.flatnonzero(context.fold == fold) for fold in np.unique(context.fold)]
        return [(test, self.without({ids[row] for row in test})) for test in rows]

    def without(self, ids: set[str]) -> np.ndarray:
        """Rows of the samples that are not in `ids`: none scores itself. `ValueError` when that leaves no anchor."""
        left_out = self._names(ids)
        rows = np.array([row for row, sample_id in enumerate(self.ids) if sample_id not in left_out], dtype=int)
        sides = set(self.side[torch.from_numpy(rows)].tolist())
        if not {-1, 1} <= sides:
            raise ValueError("leaving out the samples to be scored leaves no anchor sample; use fewer, larger anchors")
        return rows

    def _names(self, ids: set[str]) -> set[str]:
        """Sample ids, also as they may stand in the bank; `ValueError` where its key is missing."""
        if not self.keys and any(map(PLAIN.match, ids)) and any(map(KEYED.match, self.ids)):
            raise ValueError(
                "the key that the ids of the anchor bank were made with is missing, and no sample may score itself: "
                "give its file as id_key, or put it beside the bank as ids.key"
            )
        return ids.union(*({key.keyed(sample_id) for sample_id in ids} for key in self.keys))


def _template_hash(context: DifficultyContext) -> str:
    template = context.forget.template
    if template is None:
        return ""
    said = {key: value for key, value in template.items() if key != "date"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

"""Anchors: which samples are known to be easy and hard, and banks that keep them.

A bank holds the calibrated circuits of one forget request for the next one on the same model.
"""

from __future__ import annotations

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

from ...data.ids import KEYED, PLAIN, IdKey, given_key, keyed_for, keys_beside
from ...data.ranks import ends
from ...files import atomic_write, check_new_file

HEADER = ("ids", "graph", "settings")


def extremes(residual: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows with the lowest (easy) and the highest (hard) residual memorisation, `share` of the rows each.

    Equal ones are on the same side, so that a side can be larger (see `ends`).

    Raises:
        ValueError: with fewer than 2 rows or a constant residual, which tells nothing apart.
    """
    if len(residual) < 2:
        raise ValueError("anchors need at least 2 calibration samples")
    if np.ptp(residual) == 0:
        raise ValueError("calibration left every sample with the same residual memorisation: there are no anchors")
    count = min(max(1, round(share * len(residual))), len(residual) // 2)
    return ends(residual, count)


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


def given_sides(anchors: dict[str, Any], ids: list[str]) -> np.ndarray:
    """-1 for easy, 1 for hard, 0 for other samples, from ids given by hand."""
    if set(anchors) != {"easy", "hard"}:
        raise ValueError(f"anchors must have exactly the keys 'easy' and 'hard', got {sorted(anchors)}")
    position = {sample_id: row for row, sample_id in enumerate(ids)}
    key = given_key()
    if key is not None:  # as they stand in files
        position |= {key.keyed(sample_id): row for row, sample_id in enumerate(ids)}
    rows = []
    for side in ("easy", "hard"):
        unknown = [str(sample_id) for sample_id in anchors[side] if str(sample_id) not in position]
        if unknown:
            hint = "; give the key of these ids as id_key" if KEYED.match(unknown[0]) and key is None else ""
            raise ValueError(f"{side} anchor {unknown[0]!r} is not a forget sample{hint}")
        rows.append(np.array([position[str(sample_id)] for sample_id in anchors[side]], dtype=int))
    if set(rows[0]) & set(rows[1]):
        both = ids[next(iter(set(rows[0]) & set(rows[1])))]
        raise ValueError(f"sample {both!r} is both an easy and a hard anchor")
    sides = np.zeros(len(ids), dtype=int)
    sides[rows[0]], sides[rows[1]] = -1, 1
    return sides


@dataclass
class AnchorBank:
    """What a calibration run showed of its samples, and their circuits on the original model. Holds no text.

    Attributes:
        ids: sample ids, `n`.
        edges: edge scores, float32 `[n, E]`.
        residual: residual memorisation that the calibration run left, `[n]` in [0, 1], higher = harder; NaN where
            anchors were given by hand.
        side: -1 for samples of the easy anchor, 1 for the hard one, 0 for neither, int8 `[n]`.
        graph: fingerprint of the edge graph.
        settings: how the edges were scored (method, steps, baseline, metric).
        features: further features of the samples by name, `[n, p]` each, see `cud_trainer.difficulty.cud.FEATURES`.
        keys: that the ids may be made with, where they come from a file (`cud_trainer.data.ids`).
    """

    ids: list[str]
    edges: Tensor
    residual: Tensor
    side: Tensor
    graph: str
    settings: dict[str, Any]
    features: dict[str, Tensor] = field(default_factory=dict)
    keys: tuple[IdKey, ...] = field(default=(), repr=False, compare=False)

    @property
    def easy_ids(self) -> list[str]:
        """Samples of the easy anchor."""
        return [self.ids[row] for row in (self.side == -1).nonzero().flatten().tolist()]

    @property
    def hard_ids(self) -> list[str]:
        """Samples of the hard anchor."""
        return [self.ids[row] for row in (self.side == 1).nonzero().flatten().tolist()]

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a safetensors file, atomically; `ValueError` if it exists."""
        check_new_file(path, overwrite)
        tensors = {f"features/{name}": values.float().contiguous() for name, values in self.features.items()}
        tensors |= {"edges": self.edges.float().contiguous(), "residual": self.residual.double().contiguous()}
        tensors["side"] = self.side.to(torch.int8).contiguous()
        # One entry: of several the library writes them in an order of its own, different every time.
        header = {name: getattr(self, name) for name in HEADER}
        header["ids"] = keyed_for(path, self.ids, self.keys)
        metadata = {"anchors": json.dumps(header, sort_keys=True)}
        return atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata), private=True)

    @classmethod
    def load(cls, path: str | Path) -> AnchorBank:
        """Read what `save` wrote; `ValueError` for a missing or foreign file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["anchors"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            features = {name.split("/")[1]: tensors.pop(name) for name in list(tensors) if name.startswith("features/")}
            bank = cls(**tensors, **header, features=features, keys=keys_beside(path))
            bank._check_shapes()
            return bank
        except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read an anchor bank from {path}: {str(error)[:300]}") from None

    def _check_shapes(self) -> None:
        """Raise `ValueError` or `TypeError` when a part does not fit the others."""
        count = len(self.ids)
        if not isinstance(self.ids, list) or not isinstance(self.graph, str) or not isinstance(self.settings, dict):
            raise ValueError("its header is not that of an anchor bank")
        sized = {"edges": (self.edges, 2), "residual": (self.residual, 1), "side": (self.side, 1)}
        sized |= {f"features/{name}": (values, 2) for name, values in self.features.items()}
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

    def without(self, ids: set[str]) -> np.ndarray:
        """Rows of the samples that are not in `ids`: none scores itself. `ValueError` when that leaves no anchor."""
        left_out = ids.union(*({key.keyed(sample_id) for sample_id in ids} for key in self.keys))
        if not self.keys and any(map(PLAIN.match, ids)) and any(map(KEYED.match, self.ids)):
            raise ValueError(
                "the key that the ids of the anchor bank were made with is missing, and no sample may score itself: "
                "give its file as id_key, or put it beside the bank as ids.key"
            )
        rows = np.array([row for row, sample_id in enumerate(self.ids) if sample_id not in left_out], dtype=int)
        sides = set(self.side[torch.from_numpy(rows)].tolist())
        if not {-1, 1} <= sides:
            raise ValueError("leaving out the samples to be scored leaves no anchor sample; use fewer, larger anchors")
        return rows

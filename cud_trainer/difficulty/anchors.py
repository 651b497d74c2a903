"""Anchor banks: the easy and hard circuits of one forget request, kept for the next one on the same model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_write, check_new_file


@dataclass
class AnchorBank:
    """Edge scores of the anchor samples on the original model. Holds no text.

    Attributes:
        easy, hard: edge scores, float32 `[n, E]`.
        easy_ids, hard_ids: whose they are.
        mean, deviation: of log |edge score| over the calibration samples, `[E]`.
        graph: fingerprint of the edge graph.
        settings: how the edges were scored (method, steps, baseline, metric).
    """

    easy: Tensor
    hard: Tensor
    easy_ids: list[str]
    hard_ids: list[str]
    mean: Tensor
    deviation: Tensor
    graph: str
    settings: dict[str, Any]

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a safetensors file, atomically; `ValueError` if it exists."""
        check_new_file(path, overwrite)
        tensors = {name: getattr(self, name).float().contiguous() for name in ("easy", "hard", "mean", "deviation")}
        header = {name: getattr(self, name) for name in ("graph", "easy_ids", "hard_ids", "settings")}
        # One entry: of several the library writes them in an order of its own, different every time.
        metadata = {"anchors": json.dumps(header, sort_keys=True)}
        return atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> AnchorBank:
        """Read what `save` wrote; `ValueError` for a missing or foreign file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["anchors"])
                tensors = {name: file.get_tensor(name) for name in ("easy", "hard", "mean", "deviation")}
            return cls(**tensors, **header)
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read an anchor bank from {path}: {error}") from None

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

    def without(self, ids: set[str]) -> tuple[Tensor, Tensor]:
        """Easy and hard edge scores of the anchor samples that are not in `ids`: none scores itself."""
        easy = torch.tensor([sample_id not in ids for sample_id in self.easy_ids], dtype=torch.bool)
        hard = torch.tensor([sample_id not in ids for sample_id in self.hard_ids], dtype=torch.bool)
        if not easy.any() or not hard.any():
            raise ValueError("leaving out the samples to be scored leaves no anchor sample; use fewer, larger anchors")
        return self.easy[easy], self.hard[hard]

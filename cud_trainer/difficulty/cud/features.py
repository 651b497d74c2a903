"""What a calibrated fit reads of a sample: its edge scores and what other passes over the original model tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...circuits import circuit_vectors
from ...models.matrices import gradients_by_sample
from ..context import DifficultyContext
from .settings import FEATURES

OUTPUTS = ("mean_logps", "lengths", "margin", "entropy")
TINY = 1e-30


def default_features(context: DifficultyContext) -> tuple[str, ...]:
    """All of `FEATURES` that the model has: quantised weights and fused experts have no gradient of single samples."""
    return FEATURES if gradients_by_sample(context.model) else tuple(name for name in FEATURES if name != "gradients")


def sample_features(context: DifficultyContext, names: Sequence[str]) -> dict[str, Tensor]:
    """Features of every forget sample by name, without `"edges"`, `[N, p]` each."""
    features = {}
    if "hidden" in names:
        features["hidden"] = context.forget_outputs["hidden"]
    if "gradients" in names:
        features["gradients"] = 0.5 * context.gradients["squares"].double().clamp(min=TINY).log()
    if "outputs" in names:
        features["outputs"] = torch.stack([context.forget_outputs[name].double() for name in OUTPUTS], 1)
    if "mass" in names:
        features["mass"] = context.edges.double().abs().sum(1, keepdim=True).clamp(min=TINY).log()
    if "loss" in names:
        features["loss"] = torch.from_numpy(context.answers[0])[:, None]
    return features


def blocks(edges: Tensor | None, features: dict[str, Tensor], names: Sequence[str]) -> list[np.ndarray]:
    """Blocks of features for `calibrated_scores`, in the order of `names`, float64 `[N, p]` each."""
    made = []
    for name in names:
        if name == "edges":
            assert edges is not None
            made.append(circuit_vectors(edges, kind="log").double().numpy())
        else:
            made.append(features[name].double().numpy())
    return made

"""The loss of a paired batch: its terms, with the weights of the schedule and of the run so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.layers import widest_float
from ..objectives import LossTerms
from .progress import RunProgress


def weighted_loss(
    terms: LossTerms, inputs: Mapping[str, Tensor], progress: RunProgress, side: str | None = None
) -> Tensor:
    """Mean weighted forget loss plus the mean retain loss times its weight, a scalar.

    Args:
        terms: losses of the batch, `[B]` each.
        inputs: the batch, with `weight` and `retain_scale`, `[B]` each.
        progress: has the factor of each sample where weights follow the run, and the retain weight.
        side: the only one that there is, where losses are taken apart: `"retain"`, or else the forget side.
    """
    parts = []
    if side != "retain":
        weight = inputs["weight"]
        if progress.follows:
            index, dtype = inputs["forget_index"], widest_float(weight.device)
            factor = torch.from_numpy(progress.factor).to(dtype)
            weight = weight.to(dtype) * factor.to(index.device)[index]
        parts.append((weight.to(terms.forget.dtype) * terms.forget).mean())
    if terms.retain is not None:
        scale = inputs["retain_scale"].to(terms.retain.dtype)
        parts.append(progress.retain_weight * (scale * terms.retain).mean())
    return sum(parts[1:], start=parts[0])

"""Forget losses on hidden states. Pure, one loss per sample, `[B]`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..logprobs import answer_mean
from .registry import positive, register_objective


def _check(owner: str, *, layer: Any, **options: Any) -> None:
    positive("steering")(owner, **options)
    if layer is not None and (not isinstance(layer, int) or layer < 0):
        raise ValueError(f"option 'layer' of {owner} must be the index of a decoder layer, got {layer!r}")


@register_objective("rmu", retain_loss="activations", check=_check)
def misdirection(
    hidden: Tensor, mask: Tensor, direction: Tensor, *, steering: float = 2.0, layer: int | None = None
) -> Tensor:
    """Representation misdirection: `‖h_l(x) - c u‖²`, u a fixed random direction, c = `steering`.

    RMU, Li et al. 2024, arXiv 2403.03218, eq. 1: mean over answer positions and hidden dimensions. Meant for a few
    trainable layers up to `layer` (`trainable_layers` of `CUDConfig`), beside the retain loss `"activations"`.

    Args:
        layer: decoder layer (from 0) whose output is steered; by default 7/32 of the depth, as published for 7B models.
    """
    squared = (hidden - steering * direction.to(hidden)).square().mean(-1)
    return answer_mean(squared, mask)

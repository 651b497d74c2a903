"""Which weights are trained: all, an adapter's (PEFT), or those of named decoder layers."""

from __future__ import annotations

import re

from torch import nn

from .layers import decoder_layers

MOST_LAYERS = 10_000


def layer_range(text: str) -> list[int]:
    """Layers of a range such as `"5-7"` or `"0,2,4-6"`, sorted; `ValueError` for anything else."""
    layers: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"trainable_layers must be layers such as '5-7' or '0,2,4-6', got {text!r}")
        if int(match[2] or match[1]) >= MOST_LAYERS:
            raise ValueError(f"trainable_layers names layer {match[2] or match[1]}; no model has {MOST_LAYERS}")
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(layers)


def train_only(model: nn.Module, text: str) -> list[str]:
    """Freeze everything but the decoder layers `text` names; returns the names of what is trained.

    Raises:
        ValueError: for a layer that the model does not have.
    """
    wanted = layer_range(text)
    name, layers = decoder_layers(model)
    depth = len(layers)
    if wanted[-1] >= depth:
        raise ValueError(f"trainable_layers {text!r} names layer {wanted[-1]}, the model has layers 0 to {depth - 1}")
    prefixes = tuple(f"{name}.{layer}." for layer in wanted)
    trained = []
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.startswith(prefixes))
        if parameter.requires_grad:
            trained.append(parameter_name)
    return trained

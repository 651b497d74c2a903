"""The decoder layers of a causal LM, of any architecture."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers of a model, wrapped (by an adapter, for several processes) or not.

    Raises:
        ValueError: when there is no list of as many modules as the configuration says layers.
    """
    inner: Any = model
    while not hasattr(inner, "config"):
        inner = inner.module
    depth = inner.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and "vision" not in name:
            return name, module
    raise ValueError(f"{type(inner).__name__} has no list of {depth} decoder layers")


def base_causal_lm(model: Any) -> Any:
    """The transformers model inside wrappers (PEFT, distributed)."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model

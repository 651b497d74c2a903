"""The decoder layers of a causal LM, of any architecture, and where it takes its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# In the names of what a model of text and images sees and hears with.
SENSES = ("vision", "visual", "audio")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers of a model, wrapped (by an adapter, for several processes) or not.

    Raises:
        ValueError: when there is no list of as many modules as the configuration says layers.
    """
    inner = base_causal_lm(model)  # wrappers have configurations of their own
    depth = inner.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and not any(word in name for word in SENSES):
            return name, module
    raise ValueError(f"{type(inner).__name__} has no list of {depth} decoder layers")


def base_causal_lm(model: Any) -> Any:
    """The transformers model inside wrappers (PEFT, distributed, compiled)."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in which dtype a module takes its inputs; offloaded weights lie elsewhere until it is called."""
    parameter = next(module.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    if parameter.device.type == "meta":
        for part in module.modules():
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device), dtype
    return parameter.device, dtype


def widest_float(device: torch.device | str) -> torch.dtype:
    """The widest float that tensors on a device can have: float64, but on Apple's (MPS) float32."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def embedding_device(model: Any) -> torch.device:
    """Where a model takes its tokens."""
    return device_and_dtype(model.get_input_embeddings())[0]

"""Which model, which versions: what makes a number comparable to another."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .layers import base_causal_lm

SAMPLES_PER_TENSOR = 256


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights (16 hex digits) from names, shapes and up to 256 evenly spaced values per tensor.

    Values are read in bfloat16, so that a model loaded in float32 and in bfloat16 is the same model, and so is one
    with a LoRA adapter beside its weights or folded into them; it tells checkpoints apart, it is no proof of equality.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_said_weights(base_causal_lm(model)), key=lambda item: item[0]):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        stride = max(1, -(-flat.numel() // SAMPLES_PER_TENSOR))  # rounded up: the last values count, too
        digest.update(flat[::stride][:SAMPLES_PER_TENSOR].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _said_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the weights that a model works with: with a plain LoRA adapter, those that merging makes."""
    sums: dict[str, Any] = {}
    inner: set[str] = set()
    for name, module in model.named_modules():
        # The usual LoRA on a linear map or embedding; of other adapters the weights are listed as they are.
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight") and not any(_variants(module)):
            sums[f"{name}.base_layer.weight"] = module
            inner |= {f"{name}.{part}" for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and any(name.startswith(f"{part}.") or name == part for part in inner):
            continue
        value = parameter.detach()
        if name in sums and not sums[name].merged and not sums[name].disable_adapters:
            value = value.clone()
            for adapter in sums[name].active_adapters:
                if adapter in sums[name].scaling:
                    value += sums[name].get_delta_weight(adapter).to(value)
        yield name.replace(".base_layer.", "."), value


def _variants(module: Any) -> Iterator[bool]:
    """Whether an adapter of a LoRA layer is of a kind that a sum of matrices does not describe (DoRA, ...)."""
    yield from (bool(value) for value in getattr(module, "lora_variant", {}).values())
    yield from (bool(value) for value in getattr(module, "use_dora", {}).values())
    weight = getattr(module.get_base_layer(), "weight", None)
    yield weight is None or not weight.is_floating_point()


def file_hash(path: str | Path) -> str:
    """Hash of a file's bytes (16 hex digits)."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    names = ("cud-trainer", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed

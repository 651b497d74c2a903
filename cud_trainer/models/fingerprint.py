"""Which model, which versions: what makes a number comparable to another."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import torch
from torch import nn

from .layers import base_causal_lm

SAMPLES_PER_TENSOR = 256


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights (16 hex digits) from names, shapes and up to 256 evenly spaced values per tensor.

    Values are read in bfloat16, so that a model loaded in float32 and in bfloat16 is the same model; it tells
    checkpoints apart, it is no proof of equality.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_causal_lm(model).named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        stride = max(1, -(-flat.numel() // SAMPLES_PER_TENSOR))  # rounded up: the last values count, too
        digest.update(flat[::stride][:SAMPLES_PER_TENSOR].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


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

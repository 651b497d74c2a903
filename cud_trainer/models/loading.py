"""Models from a path or id, with errors that name what cannot be loaded."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM


def load_causal_lm(name: str, **options: Any) -> nn.Module:
    """`AutoModelForCausalLM.from_pretrained`; `ValueError` naming what cannot be loaded."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load a model from {name!r}: {str(error)[:500]}") from error

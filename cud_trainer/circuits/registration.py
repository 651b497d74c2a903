"""Descriptions of architectures that users register, from Python or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from ..registry import run_file
from .architectures import ARCHITECTURES, Description
from .verification import verify_architecture

# Sizes of a model to try a description on, by every name that a configuration has for them.
TINY = {
    **dict.fromkeys(("vocab_size",), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "ffn_dim", "intermediate_size", "n_inner"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}
LARGEST = 2_000_000  # parameters


def tiny_model(model_type: str) -> Any:
    """A small random model of this type, in float32; `None` where none can be built."""
    if model_type not in CONFIG_MAPPING:
        return None
    try:
        known = AutoConfig.for_model(model_type).to_dict()
        sizes = {name: value for name, value in TINY.items() if name in known}
        config = AutoConfig.for_model(model_type, **sizes)
        with torch.device("meta"):
            if AutoModelForCausalLM.from_config(config).num_parameters() > LARGEST:
                return None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()
    except Exception:  # whatever a configuration says against such sizes: the user's own model will show
        return None


def register_architecture(model_type: str, description: Description) -> None:
    """Make circuits available for models whose `config.model_type` is `model_type`.

    The description is verified (`verify_architecture`) at once on a tiny random model, where transformers knows the
    type and one can be built, and in any case on every model that it is used for first.

    Args:
        description: an `Architecture`, or a function of the model's (text) config that returns one.

    Raises:
        ValueError: when `model_type` is taken, or the description does not fit, naming the parts and by how much they
            are off.
    """
    ARCHITECTURES.add(model_type, description)
    model = tiny_model(model_type)
    if model is None:
        return
    try:
        verify_architecture(model)
    except Exception as error:
        del ARCHITECTURES[model_type]
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"the description of architecture {model_type!r} does not fit a model of that type: {error}"
        ) from error


def run_description(path: str | Path) -> list[str]:
    """Run a Python file that registers descriptions, once; the model types that it registered.

    The file is code: it can do whatever you can.

    Raises:
        ValueError: when there is no such file, it fails, or it registers nothing.
    """
    added = [name for kind, name in run_file(path, [ARCHITECTURES], "architecture") if kind == ARCHITECTURES.kind]
    if not added:
        raise ValueError(f"architecture: {Path(path).name} calls register_architecture for no model type")
    return added

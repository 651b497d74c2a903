"""Which weights are trained: all, an adapter's (PEFT), or those of named decoder layers."""

from __future__ import annotations

import re
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from .layers import decoder_layers
from .modes import restored_afterwards

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


def check_trained(model: nn.Module, peft_config: Any = None) -> None:
    """Raise `ValueError` when a run on this model, with this adapter to be put on, could train nothing, or not that.

    The adapter is put on and taken off again: what PEFT or the trainer would refuse is refused before any compute.
    """
    if peft_config is None:
        _check_wrapped(model)
        return
    _check_names(model, peft_config)
    peft_config = deepcopy(peft_config)
    if hasattr(peft_config, "init_lora_weights"):
        peft_config.init_lora_weights = True  # others take long
    with torch.random.fork_rng(devices=[]):
        try:
            with restored_afterwards(model, peft_config) as wrapped:
                _check_wrapped(wrapped)
        except (TypeError, AttributeError, KeyError, NotImplementedError, ImportError, RuntimeError, re.error) as error:
            raise ValueError(f"the adapter cannot be put on this model: {str(error)[:500]}") from error


def _check_names(model: nn.Module, peft_config: Any) -> None:
    """Raise `ValueError` for a part of the model that an adapter names and that is not there: PEFT drops some."""
    parts = {
        "modules_to_save": [name for name, _ in model.named_modules()],
        "target_parameters": [name for name, _ in model.named_parameters()],
    }
    for option, there in parts.items():
        given = getattr(peft_config, option, None) or ()
        for name in [given] if isinstance(given, str) else given:
            if not any(part == name or part.endswith(f".{name}") for part in there):
                raise ValueError(f"the model has no {name!r}, which {option} of the adapter names")


def _check_wrapped(model: Any) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            "nothing would be trained: no weight of the model takes a gradient. An adapter must be loaded to be "
            "trained (PeftModel.from_pretrained(..., is_trainable=True), inference_mode off); else set requires_grad"
        )
    if any(parameter.dtype == torch.float16 for parameter in trained):
        raise ValueError(
            "the weights to train are float16: steps of the size of the learning rate round to nothing or overflow in "
            "it. Load them in float32 (with fp16 or bf16 for mixed precision) or in bfloat16, or train an adapter"
        )
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ValueError(
                "an adapter on the output layer is not supported: the trainer reads its weights directly. Take it out "
                "of target_modules, or train all of it (modules_to_save)"
            )


SAMPLED = 4096  # values of a weight that are looked at


@torch.no_grad()
def movable_share(model: nn.Module, step: float) -> float | None:
    """Share of the bfloat16 weights to train, in [0, 1], that a step of this size changes; `None` without such weights.

    bfloat16 keeps 8 significant bits: what is less than half the distance to the next number is lost, in every step
    again. Up to 4096 values of each weight are looked at, evenly spaced.
    """
    moved = total = 0.0
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter.dtype != torch.bfloat16:
            continue
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // SAMPLED)]
        away = (values.float() + step * values.float().sign()).to(torch.bfloat16)
        moved += parameter.numel() * float((away != values).float().mean())
        total += parameter.numel()
    return moved / total if total else None


def check_gradients(model: nn.Module, *, every_layer: bool) -> None:
    """Raise `ValueError` when the gradients of a first step are 0 everywhere, or in all that a layer trains.

    Args:
        every_layer: whether the loss depends on all decoder layers.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    prefix = ""
    with suppress(ValueError):  # an architecture without one list of layers is all "the rest"
        prefix = f"{decoder_layers(model)[0]}."
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            number = name.removeprefix(prefix).split(".")[0] if prefix and name.startswith(prefix) else ""
            parts.setdefault(f"layer {number}" if number else "the rest", []).append(parameter)
    moved = {name: any(bool(p.grad.any()) for p in part if p.grad is not None) for name, part in parts.items()}
    if not any(moved.values()):
        raise ValueError(
            "the gradient of the first step is zero in every weight: nothing would be trained. Quantised weights may "
            "pass no gradient on this device; or the objective does not depend on what is trained"
        )
    still = [name for name, moves in moved.items() if not moves and name != "the rest"]
    if every_layer and still:
        raise ValueError(
            f"the gradient of the first step is zero in all that {still[0]} trains ({len(still)} of {len(parts)} parts "
            "do not move): quantised weights may pass no gradient on this device"
        )

"""What is done to a model and put back: modes, flags, weights, forward functions. Nothing outlives its context."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# LoRA initialisations that leave the model's own weights alone; others (PiSSA, OLoRA, ...) take something out of them.
PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")

# How modules and configurations name the rate at which they drop something in training.
DROPS = re.compile("drop")


@contextmanager
def drawing_nothing(model: nn.Module) -> Iterator[None]:
    """A model in training mode draws nothing at random, inside: it says what it says in evaluation mode.

    Modules are in evaluation mode, but for those that checkpointing needs in training mode: of these, and in the
    configuration, the rates of dropout and of layers that are left out are 0. Switching off `nn.Dropout` would not be
    enough: most architectures drop out by a function, some draw in their router. All is as it was afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        if module is not model and not hasattr(module, "gradient_checkpointing"):
            module.training = False
    rates = list(_rates(model))
    try:
        for table, name, _ in rates:
            table[name] = 0.0
        yield
    finally:
        for table, name, rate in rates:
            table[name] = rate
        for module, mode in modes.items():
            module.training = mode


def _rates(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, float]]:
    """Every rate at which a module in training mode may drop something: the table it is in, its name, its value."""
    for table in [*(vars(module) for module in model.modules() if module.training), *_configs(model)]:
        yield from ((table, name, rate) for name, rate in table.items() if DROPS.search(name) and _is_rate(rate))


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in its own, also where they differ."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# What a training loop leaves on modules, and on configurations.
LEFT_ON_MODULES = ("training", "forward", "_original_forward", "gradient_checkpointing", "_gradient_checkpointing_func")
LEFT_ON_CONFIGS = ("use_cache", "output_router_logits", "router_aux_loss_coef")


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """What a training loop sets on a model is as it was afterwards: modes, checkpointing, wrapped forward functions,
    and entries of the configuration. Weights, and modules that were put in, stay."""
    tables: list[tuple[dict[str, Any], tuple[str, ...]]]
    tables = [(vars(module), LEFT_ON_MODULES) for module in model.modules()]
    tables += [(config, LEFT_ON_CONFIGS) for config in _configs(model)]
    before = [{name: table[name] for name in names if name in table} for table, names in tables]
    try:
        yield
    finally:
        for (table, names), values in zip(tables, before, strict=True):
            for name in names:
                table.pop(name, None)
            table.update(values)


def _configs(model: nn.Module) -> list[dict[str, Any]]:
    """The tables of all configurations of a model and its parts."""
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig):
            for one in (config, config.get_text_config()):
                configs[id(one)] = one
    return [vars(config) for config in configs.values()]


@contextmanager
def on_device(model: nn.Module, device: torch.device, *, put_back: bool) -> Iterator[None]:
    """The model on this device; one that is spread over devices already stays where it is.

    Args:
        put_back: whether it goes back to where it was; else it stays.
    """
    if hasattr(model, "hf_device_map"):
        yield
        return
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        if put_back and before != device:
            model.to(before)


@contextmanager
def gradient_flags_kept(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The model's parameters; afterwards each takes a gradient if it did before."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield list(flags)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients inside, but for those given one there; all flags restored afterwards."""
    with gradient_flags_kept(model) as parameters:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield


@contextmanager
def all_trained(model: nn.Module) -> Iterator[None]:
    """Every weight takes a gradient; afterwards those that did before."""
    with gradient_flags_kept(model) as parameters:
        for parameter in parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        yield


@contextmanager
def evaluation_without_gradients(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients."""
    with evaluation_mode(model), frozen(model):
        yield


@contextmanager
def restored_afterwards(model: nn.Module, peft_config: Any) -> Iterator[nn.Module]:
    """The model to train, put back as it was on leaving.

    Dropout stays off (evaluation mode): it would blur which sample goes first. Weights that are trained in place, or
    changed by an adapter's initialisation, are kept aside on the CPU; an adapter is taken off again.
    """
    # Taking an adapter off leaves trained copies of `modules_to_save` and hooks behind; some cannot be taken off.
    tables: list[Any] = [table for module in model.modules() for table in (module._modules, module._forward_hooks)]
    contents = [dict(table) for table in tables]
    trained: Any = model
    saved: dict[nn.Parameter, Tensor] = {}
    with evaluation_mode(model), gradient_flags_kept(model) as parameters:
        try:
            if peft_config is not None:
                from peft import get_peft_model

                if getattr(peft_config, "init_lora_weights", None) not in PLAIN_INITIALISATIONS:
                    saved = {p: p.detach().cpu().clone() for p in parameters}
                trained = get_peft_model(model, deepcopy(peft_config)).eval()  # PEFT writes into what it is given
            for parameter in parameters:  # also biases that the adapter trains
                if parameter.requires_grad and parameter not in saved:
                    saved[parameter] = parameter.detach().cpu().clone()
            yield trained
        finally:
            if trained is not model and hasattr(trained, "unload"):
                trained.unload()
            for table, entries in zip(tables, contents, strict=True):
                table.clear()
                table.update(entries)
            with torch.no_grad():
                for parameter, values in saved.items():
                    parameter.copy_(values)
            for parameter in parameters:
                parameter.grad = None


@contextmanager
def ungrouped(attention: Any, n_heads: int) -> Iterator[None]:
    """The attention takes one key/value head per query head from its projections, inside."""
    values = {"num_key_value_groups": 1, "num_key_value_heads": n_heads}
    before = {name: getattr(attention, name) for name in values if hasattr(attention, name)}
    try:
        for name in before:
            setattr(attention, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(attention, name, value)


@contextmanager
def answering(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`module` runs `forward` in place of its own, inside. Offloading has put an instance attribute there before us."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before

"""Weights that are split over processes: FSDP 2 and DeepSpeed's stage 3 leave a part of every tensor in each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP 2 may have split, whole; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed keeps a part of this parameter in each process (stage 3, `zero.Init`)."""
    return hasattr(parameter, "ds_id")


def is_split(model: nn.Module) -> bool:
    """Whether any weight of a model is split over processes, by FSDP 1 or 2 or by DeepSpeed's stage 3."""
    wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return wrapped or any(isinstance(weight, DTensor) or is_partitioned(weight) for weight in model.parameters())


def sampled_values(parameter: nn.Parameter, most: int) -> Tensor:
    """Up to `most` evenly spaced values of a parameter; where it is split, every process has to ask."""
    if is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return _sampled(parameter.detach(), most)
    return _sampled(whole(parameter.detach()), most)


def _sampled(tensor: Tensor, most: int) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, -(-len(flat) // most))].clone()


@contextmanager
def loaded_whole(settings: Any) -> Iterator[None]:
    """Models that are loaded inside come whole, where DeepSpeed's stage 3 has transformers partition them.

    Args:
        settings: the configuration that transformers was told of; `None` without DeepSpeed.
    """
    if settings is None or not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(settings)


def as_deepspeed_trains(model: nn.Module, settings: Any) -> None:
    """Cast the weights as DeepSpeed will when it takes the model: to bfloat16 or float16, where its settings say so.

    It makes its float32 copy of what was rounded then, so that nothing is lost by rounding now; and what the model is
    said to say before the run is what it says in the first step.

    Args:
        settings: the configuration, as accelerate holds it.
    """
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if settings.is_true(f"{name}.enabled"):
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)

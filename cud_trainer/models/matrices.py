"""The weight matrices of a model and the modules that use them: what gradient and noise metrics look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layers import base_causal_lm

KINDS = (nn.Linear, Conv1D, nn.Embedding)


@dataclass
class WeightMatrix:
    """A weight matrix and the modules that multiply by it: one, or embedding and output when these are tied.

    Attributes:
        name: of the parameter.
        weight: the parameter.
        modules: linear maps, `Conv1D` or embeddings.
    """

    name: str
    weight: Tensor
    modules: list[nn.Module]


def weight_matrices(model: nn.Module) -> list[WeightMatrix]:
    """All weight matrices of a causal LM, in module order; gains and biases (a thousandth of it) are not among them.

    Raises:
        ValueError: for a matrix of another kind of module (a fused mixture of experts), naming it, and for quantised
            weights.
    """
    base: Any = base_causal_lm(model)
    matrices: dict[int, WeightMatrix] = {}
    covered = set()
    for name, module in base.named_modules():
        if not isinstance(module, KINDS):
            continue
        weight = module.weight
        covered.add(id(weight))
        if not weight.is_floating_point():
            raise ValueError(f"{name}.weight is quantised ({weight.dtype}): gradients and noise need floating point")
        matrices.setdefault(id(weight), WeightMatrix(f"{name}.weight", weight, [])).modules.append(module)
    for name, parameter in base.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in covered:
            raise ValueError(f"{name} belongs to no linear map or embedding: its gradient cannot be taken by sample")
    return list(matrices.values())


def gradients_by_sample(model: nn.Module) -> bool:
    """Whether `weight_matrices` can tell the gradients of single samples apart."""
    try:
        weight_matrices(model)
    except ValueError:
        return False
    return True


def embedding_scale(module: nn.Module) -> Tensor | float:
    """What an embedding multiplies its rows by (Gemma)."""
    return getattr(module, "embed_scale", 1.0)


def columns_out(module: nn.Module) -> bool:
    """Whether the matrix is kept as `[in, out]`."""
    return isinstance(module, Conv1D)


def multiply(x: Tensor, matrix: Tensor, module: nn.Module) -> Tensor:
    """What `module` would compute from `x` with `matrix` for its weight and no bias."""
    if isinstance(module, nn.Embedding):
        return torch.nn.functional.embedding(x, matrix) * embedding_scale(module)
    return x @ (matrix if columns_out(module) else matrix.t())

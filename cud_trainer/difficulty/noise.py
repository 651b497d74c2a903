"""Gaussian noise on a model's weights that never touches them.

A linear map with noise on its weight is the map plus the noise times its input, so the noise is added to what modules
put out. Weights cannot be left changed, whatever happens, and only one matrix of noise exists at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..logprobs import score_answers
from ..models.matrices import WeightMatrix, multiply, weight_matrices
from ..models.modes import evaluation_mode
from ..models.precision import exact
from .outputs import last_hidden


@torch.no_grad()
def noise_effects(
    model: PreTrainedModel, batch: dict[str, Tensor], *, sigma: float, draws: int, seed: int
) -> dict[str, Tensor]:
    """How much answers and features move under noise on the weights, means over `draws`, each float32 `[B]`.

    Args:
        batch: `input_ids`, `attention_mask`, `labels`, each `[B, T]`; any padding side.
        sigma: standard deviation of the noise as a share of each weight matrix's own.

    Returns:
        `drop`: mean answer log-probability without noise minus with it, nats per token;
        `relative_drop`: the same divided by the mean log-probability's size;
        `deviation`: distance of the last hidden state, mean over the answer, relative to its length.
    """
    with evaluation_mode(model), exact(model):
        clean = score_answers(model, batch, output_hidden_states=True)
        feature = last_hidden(clean)
        drop = torch.zeros_like(clean.mean_logps)
        deviation = torch.zeros_like(feature[:, 0])
        for draw in range(draws):
            with parameter_noise(model, sigma=sigma, seed=seed * 10_007 + draw):
                noisy = score_answers(model, batch, output_hidden_states=True)
            drop += (clean.mean_logps - noisy.mean_logps) / draws
            deviation += (last_hidden(noisy) - feature).norm(dim=1) / feature.norm(dim=1) / draws
    # log-probabilities of 0 (probability 1 in the model's precision) have no relative change
    size = clean.mean_logps.abs().clamp(min=torch.finfo(torch.float32).eps)
    return {"drop": drop.float(), "relative_drop": (drop / size).float(), "deviation": deviation.float()}


@contextmanager
def parameter_noise(model: nn.Module, *, sigma: float, seed: int) -> Iterator[None]:
    """While open, every weight matrix `W` acts as `W + sigma * std(W) * e`, `e` standard normal and drawn from `seed`.

    Tied matrices get the same noise. Gains and biases get none.

    Raises:
        ValueError: for quantised weights and modules that are not understood, see `weight_matrices`.
    """
    handles = []
    try:
        for index, matrix in enumerate(weight_matrices(model)):
            for module in matrix.modules:
                handles.append(module.register_forward_hook(_hook(matrix, sigma, hash_of(seed, index))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def hash_of(seed: int, index: int) -> int:
    """A seed for matrix `index`: neighbouring seeds share no noise."""
    return (seed * 1_000_003 + index * 7_919 + 1) % (2**63)


def _hook(matrix: WeightMatrix, sigma: float, seed: int) -> Any:
    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = matrix.weight
        generator = torch.Generator(weight.device).manual_seed(seed)
        noise = torch.randn(weight.shape, generator=generator, device=weight.device)
        noise *= sigma * float(weight.float().std())
        x = inputs[0] if isinstance(module, nn.Embedding) else inputs[0].to(noise.dtype)
        return (output + multiply(x, noise, module)).to(output.dtype)

    return forward

"""How far one step on a sample would move the model: the norm of its own gradient, as an attack."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from cud_trainer.data import Samples
from cud_trainer.difficulty.gradients import sample_gradients
from cud_trainer.models.layers import embedding_device
from cud_trainer.models.matrices import weight_matrices
from cud_trainer.models.memory import each_batch
from cud_trainer.models.modes import evaluation_mode


def gradient_norms(
    model: PreTrainedModel, samples: Samples, *, batch_size: int = 16, desc: str | None = None
) -> np.ndarray:
    """Norm of the gradient of each sample's mean answer loss, float64 `[N]`; of `samples.measured`.

    With respect to all weight matrices of the model (gains and biases, a thousandth of it, are left out). Under a LoRA
    adapter these are the matrices that it changes, so that a merged model gives the same figures. What was trained on
    has a small gradient (Nasr et al. 2019, arXiv 1812.00910; the white-box attack of open-unlearning).

    Raises:
        ValueError: for a model whose gradients cannot be told by sample (`check_gradient_norms`).
    """
    samples, own = samples.measured, _own_matrices(model)
    norms = np.zeros(len(samples))

    def squares(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return sample_gradients(model, batch)["squares"][:, own].cpu().double()

    with evaluation_mode(model):
        for rows, found in each_batch(samples, squares, batch_size, device=embedding_device(model), desc=desc):
            norms[rows] = found.sum(1).sqrt().numpy()
    return norms


def check_gradient_norms(model: nn.Module, name: str) -> None:
    """Raise `ValueError` naming why the gradients of the model `name` cannot be told by sample."""
    try:
        _own_matrices(model)
    except ValueError as error:
        raise ValueError(f"gradient_norm cannot be measured on {name!r}: {error}") from None


def _own_matrices(model: nn.Module) -> torch.Tensor:
    """True for the weight matrices of the model itself, bool `[M]`; those of an adapter beside them are not."""
    return torch.tensor([".lora_" not in f".{matrix.name}" for matrix in weight_matrices(model)])

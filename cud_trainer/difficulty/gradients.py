"""Gradients of single samples, from one forward and one backward pass of the whole batch.

The gradient of a linear map's weight is the sum over positions of `g_t a_t^T` (output gradient times input), so its
norm is `sum_{s,t} (a_s . a_t)(g_s . g_t)` and its product with a fixed matrix G is `sum_t g_t . G a_t`: neither needs
the gradient itself (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679, "ghost clipping").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..logprobs import score_answers, wide
from ..models.matrices import WeightMatrix, columns_out, embedding_scale, multiply, weight_matrices
from ..models.modes import evaluation_without_gradients
from ..models.precision import exact


def sample_gradients(
    model: PreTrainedModel, batch: dict[str, Tensor], direction: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Gradient of each sample's mean answer loss with respect to every weight matrix: norms, and a product.

    Args:
        batch: `input_ids`, `attention_mask`, `labels`, each `[B, T]`; any padding side.
        direction: a gradient per weight matrix, as `mean_gradient` returns.

    Returns:
        `squares`: squared norm per sample and matrix, float32 or wider, `[B, M]`, in the order of `weight_matrices`;
        `products`: inner product with `direction`, `[B]` (only if it is given).

    Raises:
        ValueError: for a model with weights that cannot be told by sample, see `weight_matrices`.
    """
    recorder = GradientRecorder(weight_matrices(model), direction)
    with evaluation_without_gradients(model), exact(model), torch.enable_grad(), recorder.attached():
        scores = score_answers(model, batch)
        (-scores.mean_logps).sum().backward()
    return recorder.results(len(batch["input_ids"]))


def mean_gradient(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """Gradient of the mean answer loss over all samples of `batches`, by weight matrix: as large as the model.

    Raises:
        ValueError: as `sample_gradients`.
    """
    weights = [matrix.weight for matrix in weight_matrices(model)]
    before = {weight: weight.grad for weight in weights}
    samples = 0
    try:
        with evaluation_without_gradients(model), exact(model), torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
                weight.grad = None
            for batch in batches:
                (-score_answers(model, batch).mean_logps).sum().backward()
                samples += len(batch["input_ids"])
        return [
            torch.zeros_like(weight) if weight.grad is None else (weight.grad / samples).detach() for weight in weights
        ]
    finally:
        for weight in weights:
            weight.grad = before[weight]


class GradientRecorder:
    """Turns inputs and output gradients of modules into norms and products as the backward pass meets them.

    While it is `attached`, one forward and one backward pass run; rows of the batch are told apart. Of what gradient
    checkpointing runs twice, the first run with a graph counts: hang `begin_backward` on the loss.
    """

    def __init__(self, matrices: list[WeightMatrix], direction: list[Tensor] | None = None) -> None:
        self.backward_began = False
        self.matrices, self.direction = matrices, direction
        self.squares: list[Tensor | None] = [None] * len(matrices)
        self.products: Tensor | None = None
        self.seen: set[nn.Module] = set()
        # of a tied matrix: inputs and gradients of the module met first, until the other one comes
        self.halves: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}

    def begin_backward(self, gradient: Tensor) -> None:
        """A hook for the loss, whose gradient comes first."""
        self.backward_began = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        try:
            for index, matrix in enumerate(self.matrices):
                for module in matrix.modules:
                    handles.append(module.register_forward_hook(self._hook(index)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():  # reentrant checkpointing: the pass with a graph comes in the backward pass
                return
            if module in self.seen:
                if self.backward_began:
                    return
                raise ValueError(
                    f"{self.matrices[index].name} is used more than once in a pass: its gradient cannot be taken by "
                    "sample"
                )
            self.seen.add(module)
            if not output.requires_grad:  # weights are frozen: this is where the graph begins
                output.requires_grad_()
            x = inputs[0].detach()
            output.register_hook(lambda gradient: self._take(index, module, x, gradient))

        return forward

    @torch.no_grad()
    def _take(self, index: int, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        gradient = wide(gradient)
        if isinstance(module, nn.Embedding):
            gradient = gradient * embedding_scale(module)
            if module.padding_idx is not None:
                gradient = gradient.masked_fill((x == module.padding_idx).unsqueeze(-1), 0.0)
        else:
            x = wide(x)
        x = x.expand(len(gradient), *x.shape[1:])  # positions may be those of all rows
        square = _square(module, x, gradient)
        if len(self.matrices[index].modules) > 1:
            if index in self.halves:
                square = square + 2 * _tied_product(*self.halves.pop(index), module, x, gradient)
            else:
                self.halves[index] = (module, x, gradient)
        so_far = self.squares[index]
        self.squares[index] = square if so_far is None else so_far + square.to(so_far.device)
        if self.direction is not None:
            fixed = self.direction[index].to(gradient.device, gradient.dtype)
            if isinstance(module, nn.Embedding):
                product = (torch.nn.functional.embedding(x, fixed) * gradient).flatten(1).sum(1)
            else:
                product = (multiply(x, fixed, module) * gradient).flatten(1).sum(1)
            self.products = product if self.products is None else self.products + product.to(self.products.device)

    def results(self, size: int) -> dict[str, Tensor]:
        squares = [torch.zeros(size) if square is None else square.cpu() for square in self.squares]
        results = {"squares": torch.stack(squares, dim=1).clamp(min=0)}
        if self.direction is not None:
            assert self.products is not None
            results["products"] = self.products.cpu()
        return results


def _square(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Squared norm of each sample's weight gradient, `[B]`, by whichever way is less work."""
    if isinstance(module, nn.Embedding):
        same = x.unsqueeze(1) == x.unsqueeze(2)
        return ((gradient @ gradient.transpose(1, 2)) * same).flatten(1).sum(1)
    positions, n_in, n_out = x.shape[1], x.shape[2], gradient.shape[2]
    if positions * (n_in + n_out) <= n_in * n_out:
        return ((x @ x.transpose(1, 2)) * (gradient @ gradient.transpose(1, 2))).flatten(1).sum(1)
    return torch.stack([(g.t() @ a).square().sum() for a, g in zip(x, gradient, strict=True)])


def _tied_product(first: nn.Module, x: Tensor, gradient: Tensor, second: nn.Module, y: Tensor, other: Tensor) -> Tensor:
    """Inner product of the gradients that an embedding and an output map give to the matrix they share, `[B]`."""
    if isinstance(first, nn.Embedding) == isinstance(second, nn.Embedding):
        raise ValueError(
            "a weight matrix is shared by two maps of the same kind: its gradient cannot be taken by sample"
        )
    if isinstance(second, nn.Embedding):
        first, x, gradient, second, y, other = second, y, other, first, x, gradient
    ids, embedded, hidden, logits = x, gradient, y, other
    assert not columns_out(second)
    rows = logits.gather(2, ids.unsqueeze(1).expand(-1, logits.shape[1], -1))
    return (rows * (hidden @ embedded.transpose(1, 2))).flatten(1).sum(1)

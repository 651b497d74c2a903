"""Node-wise interpolation (`ig-activations`), exact: what the CUD authors ran, at a fraction of its cost.

For every node n (the embedding, all heads of a layer together, each MLP) and every point k = 1..m, the output of n is
replaced by a constant between its baseline and its clean value; the gradients at *every* destination, averaged over all
(1 + 2 L) m runs, are contracted with `corrupt - clean`. Done literally that is (1 + 2 L) m passes. But:

- the layers before n are clean in all of n's runs, so only the layers behind n are run again;
- k = m is the clean pass itself, which all nodes share;
- backward through the clean part is linear, so what arrives at the nodes' outputs is summed over all runs and pulled
  back through it once. Node n itself is a constant in its own runs: its share goes around it, by the skip connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..logprobs import wide
from ..models.modes import answering
from .contraction import GradientSums
from .recording import Pass, Recorder, SourceOutputs, scaled

Evaluate = Callable[[Tensor], Any]


def interpolate_nodes(
    recorder: Recorder,
    sums: GradientSums,
    evaluate: Evaluate,
    embeddings: Tensor,
    corrupt: SourceOutputs | None,
    *,
    steps: int,
    reference_quirk: bool = False,
) -> tuple[Any, Pass]:
    """Add the gradients of all runs to `sums`.

    Args:
        evaluate: from input embeddings to a `Point`.
        corrupt: baseline outputs, `None` for zero.
        steps: points per node.
        reference_quirk: runs that interpolate the embedding give no gradient to destinations that read nothing but it
            (with learned positions there are none).

    Returns:
        the clean `Point`, and the record of the clean pass.
    """
    layers, parallel = recorder.parts.layers, recorder.parts.description.parallel
    n_layers = len(layers)
    runs = (1 + 2 * n_layers) * steps
    quirk = [(1, 1)] * n_layers  # how often the embedding's own runs count at each layer

    # The clean pass: k = m of every node. Its graph stays alive for the pull-back at the end.
    inputs = embeddings.detach().requires_grad_()
    clean = recorder.start(live=True)
    point = evaluate(inputs)
    attention = [_live(layer.attention_live) for layer in clean.layers]
    mlp = [_live(layer.mlp_live) for layer in clean.layers]
    residual = [*(_live(layer.residual) for layer in clean.layers), _live(clean.final_residual)]
    gradients = torch.autograd.grad(point.objective.sum(), [inputs, *attention, *mlp], retain_graph=True)
    before = [(1 + 2 * index, (1 if parallel else 2) + 2 * index) for index in range(n_layers)]  # nodes upstream
    if reference_quirk and torch.equal(residual[0], scaled(inputs, recorder.parts.description.embedding_scale)):
        quirk[0] = (0, 0 if parallel else 1)
        before[0] = (0, before[0][1] - (1 - quirk[0][1]))
    factor = point.factor / runs
    sums.add(clean, factor, before, 1 + 2 * n_layers)
    # Everything below is at the residual stream, which takes `residual_scale` times what a module puts out.
    into = recorder.parts.description.residual_scale
    first = recorder.parts.description.embedding_scale
    at_attention = [_scale(gradient, factor / into) for gradient in gradients[1 : 1 + n_layers]]
    at_mlp = [_scale(gradient, factor / into) for gradient in gradients[1 + n_layers :]]
    del gradients

    moves = _moves(recorder, clean, embeddings, corrupt)
    for k in range(1, steps):
        share = 1 - k / steps
        start = (embeddings + share / first * moves[0]).to(embeddings).detach().requires_grad_()
        _run(recorder, sums, evaluate, start, start, runs, quirk)
        for index in range(n_layers):
            away = (share * moves[1][index]).to(embeddings.dtype)
            if parallel:
                leaf = (residual[index + 1].detach() + away).requires_grad_()
                with _skipping(layers, index + 1, leaf):
                    got = _run(recorder, sums, evaluate, embeddings, leaf, runs)
            else:
                leaf = (attention[index].detach() + away / into).requires_grad_()
                with (
                    _skipping(layers, index, residual[index].detach()),
                    _replaced(layers[index].attention_output, leaf),
                ):
                    got = _run(recorder, sums, evaluate, embeddings, leaf, runs) / into
            at_attention[index] += got
            leaf = (residual[index + 1].detach() + (share * moves[2][index]).to(embeddings.dtype)).requires_grad_()
            with _skipping(layers, index + 1, leaf):
                at_mlp[index] += _run(recorder, sums, evaluate, embeddings, leaf, runs)

    targets, cotangents = _upstream(residual, attention, mlp, at_attention, at_mlp, parallel, into)
    unit = _unit(cotangents, embeddings.device)
    in_range = [
        (cotangent / unit.to(cotangent.device).view(-1, 1, 1)).to(target.dtype)
        for target, cotangent in zip(targets, cotangents, strict=True)
    ]
    torch.autograd.grad(targets, inputs, grad_outputs=in_range)
    sums.add(clean, unit)
    return point, clean


def _upstream(
    residual: list[Tensor],
    attention: list[Tensor],
    mlp: list[Tensor],
    at_attention: list[Tensor],
    at_mlp: list[Tensor],
    parallel: bool,
    into: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of the clean pass, and the cotangents that the nodes' own runs put in there.

    A cotangent that arrives at a node's output in that node's own runs passes through everything upstream of it, but
    not through the node: in at the layer's input, and at what else was added on the way.
    """
    targets, cotangents = [], []
    for index in range(len(attention)):
        pairs = [(residual[index], at_attention[index] + at_mlp[index]), (attention[index], into * at_mlp[index])]
        if parallel:
            pairs.append((mlp[index], into * at_attention[index]))
        for target, cotangent in pairs if index else pairs[1:]:  # nothing is upstream of the first layer's input
            targets.append(target)
            cotangents.append(cotangent)
    return targets, cotangents


def _unit(cotangents: list[Tensor], device: torch.device) -> Tensor:
    """A power of 2 near each sample's largest cotangent, `[B]`: divided by it, half precision stays in range."""
    largest = torch.stack([cotangent.abs().amax((1, 2)).to(device) for cotangent in cotangents]).amax(0)
    return torch.exp2(largest.clamp(min=torch.finfo(largest.dtype).tiny).log2().round())


def _run(
    recorder: Recorder,
    sums: GradientSums,
    evaluate: Evaluate,
    inputs: Tensor,
    leaf: Tensor,
    runs: int,
    counts: list[tuple[int, int]] | None = None,
) -> Tensor:
    """One run: its gradients go to `sums`, that of `leaf` is returned."""
    record = recorder.start()
    point = evaluate(inputs)
    (gradient,) = torch.autograd.grad(point.objective.sum(), leaf)
    sums.add(record, point.factor / runs, counts)
    return _scale(gradient, point.factor / runs)


@torch.no_grad()
def _moves(
    recorder: Recorder, clean: Pass, embeddings: Tensor, corrupt: SourceOutputs | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`corrupt - clean` of every node's output: embedding, attention by layer (without W_O's bias), MLP by layer."""
    outputs = recorder.outputs(clean, embeddings)

    def move(output: Tensor, baseline: Tensor | None) -> Tensor:
        return -wide(output) if baseline is None else wide(baseline).to(output.device) - wide(output)

    attention = []
    for index, maps in enumerate(recorder.maps):
        heads = move(outputs.heads[index], None if corrupt is None else corrupt.heads[index])
        attention.append(heads @ maps.writers().flatten(0, 1))
    mlps = [move(output, None if corrupt is None else corrupt.mlps[index]) for index, output in enumerate(outputs.mlps)]
    return move(outputs.embedding, None if corrupt is None else corrupt.embedding), attention, mlps


def _live(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _scale(gradient: Tensor, factor: Tensor) -> Tensor:
    return wide(gradient) * factor.to(gradient.device).view(-1, 1, 1)


@contextmanager
def _skipping(layers: list, count: int, output: Tensor) -> Iterator[None]:
    """The first `count` layers are not run; the last of them returns `output`."""
    with ExitStack() as stack:
        for index in range(count):
            forward = partial(_answer, output if index == count - 1 else None)
            stack.enter_context(answering(layers[index].module, forward))
        yield


def _answer(output: Tensor | None, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states if output is None else output


@contextmanager
def _replaced(module: nn.Module, output: Tensor) -> Iterator[None]:
    handle = module.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()

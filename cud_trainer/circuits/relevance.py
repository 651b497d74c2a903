"""Relevance patching (`relp`): the backward pass follows the rules of layer-wise relevance propagation.

RelP (Rezaei Jafari et al. 2025, arXiv 2508.21258) scores an edge as EAP does, `(corrupt_u - clean_u) . g_v`, but what
arrives at v is not the gradient. Three rules replace derivatives, none changes what the model computes:

    norm        gain c(x) / s(x) + bias   the scale s(x) is a constant
    activation  a(x)                      its derivative is a(x) / x
    gated MLP   a(gate(x)) up(x)          half of what arrives goes on to each factor

Attention keeps its gradients, norms of queries and keys included, as otherwise no edge into a query or key would have a
score.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..logprobs import wide
from ..models.layers import device_and_dtype
from .maps import NormMap, norm_map
from .parts import DecoderParts, decoder_parts

# How far the number of factors may be from a whole one; sums of half-precision and quantised weights are rounded.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.03

_factors: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def relevance_rules(parts: DecoderParts) -> Iterator[None]:
    """The decoder's backward pass follows the rules of relevance propagation, inside.

    Raises:
        ValueError: for MLPs that are not products of one or two factors which read the residual stream (experts).
    """
    factors = _factors_by_layer(parts)
    norms: list[nn.Module | None] = [parts.final_norm]
    with ExitStack() as stack:
        for layer, count in zip(parts.layers, factors, strict=True):
            norms += [layer.attention_norm, layer.attention_output_norm, layer.mlp_norm, layer.mlp_output_norm]
            _follow_identity(stack, layer.mlp)
            if count > 1:
                # all behind the product is linear: a share of its gradient is that share of the output's
                stack.callback(layer.mlp.register_forward_hook(partial(_shared, count)).remove)
        for norm in {id(norm): norm for norm in norms if norm is not None}.values():
            hook = partial(_with_constant_scale, norm_map(norm, parts.hidden_size))
            stack.callback(norm.register_forward_hook(hook).remove)
        yield


def check_relevance(model: PreTrainedModel) -> None:
    """Raise `ValueError` when the rules have no meaning for the model, as with experts; no pass of the model is run."""
    _factors_by_layer(decoder_parts(model))


def _factors_by_layer(parts: DecoderParts) -> list[int]:
    return [mlp_factors(layer.mlp, index, parts) for index, layer in enumerate(parts.layers)]


def mlp_factors(mlp: nn.Module, index: int, parts: DecoderParts) -> int:
    """How many factors that read its input an MLP multiplies: 1 for a plain one, 2 for a gated one.

    Asked of the module itself: when activations count as `x` times a constant, and there are no biases, its output f is
    homogeneous of that degree, `J x = degree * f`.

    Raises:
        ValueError: when that is no whole number.
    """
    if mlp in _factors:
        return _factors[mlp]
    degree = float("nan") if _has_experts(mlp) else _degree(mlp, parts.hidden_size)
    precise = all(parameter.dtype in (torch.float32, torch.float64) for parameter in mlp.parameters())
    if not min(abs(degree - 1), abs(degree - 2)) <= (TOLERANCE if precise else HALF_TOLERANCE):
        raise ValueError(
            f"method 'relp' is not available for architecture {parts.model_type!r}: the MLP of layer {index} is not a "
            "product of one or two factors that read the residual stream, as with experts"
        )
    _factors[mlp] = round(degree)
    return _factors[mlp]


def _has_experts(mlp: nn.Module) -> bool:
    """Whether there are matrices side by side: a router's share is a factor, too, and no rule says its part."""
    return any(parameter.ndim > 2 for parameter in mlp.parameters()) or any(
        isinstance(module, nn.ModuleList) for module in mlp.modules()
    )


def _degree(mlp: nn.Module, width: int) -> float:
    device, dtype = device_and_dtype(mlp)
    probe = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    biases = {name: torch.zeros_like(p) for name, p in mlp.named_parameters() if name.rpartition(".")[2] == "bias"}
    with ExitStack() as stack, torch.enable_grad():
        _follow_identity(stack, mlp)
        x = probe.to(dtype).to(device).requires_grad_()
        written = wide(torch.func.functional_call(mlp, biases, (x,)))
        (gradient,) = torch.autograd.grad((written * written.detach()).sum(), x)
    return float((wide(gradient) * wide(x.detach())).sum() / written.detach().square().sum())


def _follow_identity(stack: ExitStack, mlp: nn.Module) -> None:
    for module in mlp.modules():
        if type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations"):
            stack.callback(module.register_forward_hook(_as_identity).remove)


def _as_identity(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The activation's output, with derivative `output / x`."""
    x = args[0]
    ratio = (output / x.where(x != 0, torch.ones_like(x))).detach()
    return output.detach() + (x - x.detach()) * ratio


def _with_constant_scale(norm: NormMap, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The norm's output, with the derivative of `gain * c(x) / s` for a constant s."""
    x = norm.centre(wide(args[0]))
    linear = norm.gain.to(x) * x * norm.inverse_scale(x.detach())
    return output.detach() + (linear - linear.detach()).to(output.dtype)


def _shared(count: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient / count)

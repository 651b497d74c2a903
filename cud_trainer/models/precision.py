"""In which precision a model computes: half-precision weights, read in float32 where figures are made of them.

A model that knows answers by heart gives them probabilities near 1. What tells such answers apart is smaller than the
rounding of half-precision activations and logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .layers import base_causal_lm, decoder_layers, embedding_device
from .modes import answering, evaluation_mode
from .shards import is_partitioned

HALF = (torch.bfloat16, torch.float16)

_takes_copies: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """A model with half-precision weights computes in float32 inside, where it `can_be_exact`; any other as it does.

    One layer at a time gets float32 copies of its weights, for as long as it runs; a backward pass makes those it
    needs again from the weights. So memory grows by one layer, or the vocabulary matrix, and activations are twice as
    wide. On GPUs products are taken in TF32, in which the weights are exact.
    """
    if not (has_half_weights(model) and can_be_exact(model)):
        yield
        return
    with _with_copies_of_weights(model):
        yield


@contextmanager
def _with_copies_of_weights(model: nn.Module) -> Iterator[None]:
    device = next(model.parameters()).device.type
    copies: dict[int, Tensor] = {}  # storage of a float32 copy -> the weight that it is of

    def pack(saved: Tensor) -> Any:
        weight = copies.get(saved.untyped_storage().data_ptr())
        if weight is None or saved.dtype != torch.float32:
            return saved.detach()
        return _View(weight.detach(), saved.shape, saved.stride(), saved.storage_offset())

    def unpack(packed: Any) -> Tensor:
        return packed.widened() if isinstance(packed, _View) else packed

    with ExitStack() as stack:
        for module in _units(model):
            stack.enter_context(answering(module, partial(_with_copies, module, module.forward, copies)))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if device == "cuda":
            stack.enter_context(float32_products("high"))
        yield


@contextmanager
def nearly_exact(model: nn.Module) -> Iterator[None]:
    """`exact`, and `lifted` for a model in half precision that cannot be: for gradients along the residual stream."""
    with lifted(model) if has_half_weights(model) and not can_be_exact(model) else exact(model):
        yield


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """A model in half precision that reads float32 embeddings keeps its residual stream in float32, inside.

    Autocast leaves its matrix products in half precision. The edges of long answers then rank more nearly as they do in
    float32, at little cost: Spearman 0.995 instead of 0.990 on SmolLM2-135M in bfloat16.
    """
    half = [p for p in model.parameters() if p.dtype in HALF]
    with ExitStack() as stack:
        for module in model.modules():
            # Autocast does this on GPUs; on CPUs a LayerNorm refuses inputs that are wider than its weights.
            if isinstance(module, nn.LayerNorm) and module.weight is not None and module.weight.dtype in HALF:
                stack.enter_context(answering(module, partial(_wide_layer_norm, module)))
        device = half[0].device.type
        stack.enter_context(torch.autocast("cpu" if device == "meta" else device, half[0].dtype))
        yield


def has_half_weights(model: nn.Module) -> bool:
    """Whether any weight of the model is in half precision."""
    return any(parameter.dtype in HALF for parameter in model.parameters())


def can_be_exact(model: nn.Module) -> bool:
    """Whether a model computes in float32 or wider in `exact`.

    Kernels of flash attention take half precision only; for quantised weights, and those that are offloaded or cut over
    several processes, no copy can stand in; nor where a model's own code reads weights past its layers (Mamba). That
    is tried once, on four tokens.
    """
    if not has_half_weights(model):
        return all(weight.is_floating_point() and weight.dtype.itemsize >= 4 for weight in model.parameters())
    inner = base_causal_lm(model)
    if getattr(inner, "hf_quantizer", None) is not None or "flash" in str(inner.config._attn_implementation):
        return False
    if not all(type(weight.data) is Tensor and weight.device.type != "meta" for weight in model.parameters()):
        return False
    if any(is_partitioned(weight) for weight in model.parameters()):
        return False
    if inner not in _takes_copies:
        _takes_copies[inner] = _tried(inner)
    return _takes_copies[inner]


@torch.no_grad()
def _tried(model: nn.Module) -> bool:
    tokens = torch.arange(2, 6, device=embedding_device(model))[None]
    with evaluation_mode(model), _with_copies_of_weights(model):
        try:
            model(input_ids=tokens, use_cache=False)
        except (RuntimeError, TypeError, ValueError):
            return False
    return True


def _units(model: nn.Module) -> list[nn.Module]:
    """The modules that get copies of all their weights while they run: every decoder layer, and what lies outside."""
    try:
        layers = set(decoder_layers(model)[1])
    except ValueError:
        return [model]

    def below(module: nn.Module) -> Iterator[nn.Module]:
        if module in layers or layers.isdisjoint(module.modules()):
            yield module
            return
        for child in module.children():
            yield from below(child)

    return list(below(model))


def _with_copies(unit: nn.Module, forward: Callable, copies: dict[int, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What `unit` answers with float32 copies of its weights and buffers; `copies` knows them meanwhile."""
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    mine: list[int] = []
    try:
        made: dict[Tensor, Tensor] = {}  # of weights that modules share, one copy
        for module in unit.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, value in table.items():
                    if value is None or value.dtype not in HALF or not value.numel():
                        continue
                    if value not in made:
                        made[value] = (value if value.requires_grad else value.detach()).float()
                        mine.append(made[value].untyped_storage().data_ptr())
                        copies[mine[-1]] = value
                    before.append((table, name, value))
                    table[name] = made[value]
        return forward(*args, **kwargs)
    finally:
        for table, name, value in before:
            table[name] = value
        for key in mine:
            copies.pop(key, None)


class _View:
    """What autograd keeps of a float32 copy: the weight, and which view of its copy a backward pass needs."""

    def __init__(self, weight: Tensor, shape: Any, stride: Any, offset: Any) -> None:
        self.weight, self.shape, self.stride, self.offset = weight, shape, stride, offset

    def widened(self) -> Tensor:
        return self.weight.float().as_strided(self.shape, self.stride, self.offset)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Matrix products of float32 on NVIDIA GPUs in TF32 (`"high"`) or in full (`"highest"`), inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _wide_layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.float()
    return nn.functional.layer_norm(x.float(), module.normalized_shape, module.weight.float(), bias, module.eps)

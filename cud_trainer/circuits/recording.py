"""Hooks that record what one pass of a decoder says about its edges: source outputs forward, gradients backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..logprobs import wide
from ..models.modes import ungrouped
from .maps import NormMap, linear_map, norm_map
from .parts import DecoderParts, LayerParts


@dataclass
class LayerPass:
    """One layer in one pass. Tensors are in the model's dtype; `B` samples of `T` positions.

    Attributes:
        norm_input: input of the attention's norm, `[B, T, d]`.
        projections, gradients: outputs of the q/k/v projections and the metric's gradients there,
            `[B, T, heads * head_dim]` each.
        heads: concatenated head outputs before W_O, `[B, T, n_heads * head_dim]`.
        heads_scale: what a norm behind W_O multiplies them with, `[B, T, 1]`, or `None`.
        mlp_output: what the MLP adds to the residual stream, `[B, T, d]`.
        mlp_gradient: gradient at the MLP's own copy of the residual stream; where the MLP shares the attention's norm,
            at that norm's output.
        residual, attention_live, mlp_live: the layer's input and what attention and MLP put out, with their autograd
            history, kept only when asked for. The residual stream gets `residual_scale` times what they put out.
    """

    norm_input: Tensor | None = None
    projections: list[Tensor | None] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    heads: Tensor | None = None
    heads_scale: Tensor | None = None
    mlp_output: Tensor | None = None
    mlp_gradient: Tensor | None = None
    residual: Tensor | None = None
    attention_live: Tensor | None = None
    mlp_live: Tensor | None = None


@dataclass
class Pass:
    """One forward (and backward) pass: its layers, and the gradient at the final norm's input `[B, T, d]`."""

    layers: list[LayerPass]
    live: bool = False
    final_gradient: Tensor | None = None
    final_residual: Tensor | None = None


@dataclass
class SourceOutputs:
    """What every source adds to the residual stream; heads before W_O, behind the scale of a norm that follows it.

    Attributes:
        embedding: `[B, T, d]`.
        heads: per layer `[B, T, n_heads * head_dim]`.
        mlps: per layer `[B, T, d]`.
    All may have size 1 in the first two axes, for outputs that are the same everywhere (mean baseline).
    """

    embedding: Tensor
    heads: list[Tensor]
    mlps: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.embedding, *self.heads, *self.mlps]


class LayerMaps:
    """The linear parts of one layer: how its heads read from and write to the residual stream.

    Attributes:
        norm: of the attention, or `None`.
        output_norm: between W_O and the residual stream, or `None`.
        constants: per projection the part of its output that does not depend on the normed input, or `None`.
    """

    def __init__(self, parts: DecoderParts, layer: LayerParts, ungroup_kv: bool) -> None:
        self.parts, self.layer = parts, layer
        hidden = parts.hidden_size
        self.norm: NormMap | None = None if layer.attention_norm is None else norm_map(layer.attention_norm, hidden)
        self.output_norm: NormMap | None = (
            None if layer.attention_output_norm is None else norm_map(layer.attention_output_norm, hidden)
        )
        groups = parts.n_heads // parts.n_kv_heads
        kv = torch.arange(parts.n_kv_heads)
        repeated = kv.repeat_interleave(groups) if ungroup_kv else kv
        query = torch.arange(parts.n_heads)
        # Which of its own heads each projection contributes, in the order of its output.
        if len(layer.qkv) == 3:
            self.expansion = [query, repeated, repeated]
        else:
            offset = parts.n_heads
            self.expansion = [torch.cat([query, offset + repeated, offset + parts.n_kv_heads + repeated])]
            if parts.description.qkv_layout == "interleaved":
                self.expansion = [torch.arange(3 * parts.n_heads)]
        self.expands = ungroup_kv and groups > 1
        self.n_destinations = sum(len(heads) for heads in self.expansion)
        # Where the destinations q, k, v (all heads of each) lie among the projections' heads.
        order = torch.arange(self.n_destinations)
        if parts.description.qkv_layout == "interleaved":
            order = order.view(-1, 3).T.flatten()
        self.order = order
        self.constants: list[Tensor | None] = []
        for module, heads in zip(layer.qkv, self.expansion, strict=True):
            weight, bias = linear_map(module, hidden)
            constant = None if bias is None else wide(bias.detach())
            if self.norm is not None and bool(self.norm.bias.any()):
                moved = wide(weight.detach()) @ self.norm.bias.to(weight.device)
                constant = moved if constant is None else constant + moved
            self.constants.append(None if constant is None else self._expand(constant, heads).flatten())

    def _expand(self, rows: Tensor, heads: Tensor) -> Tensor:
        """Rows of a projection by head, `[heads, head_dim, ...]`."""
        rows = rows.reshape(-1, self.parts.head_dim, *rows.shape[1:])
        return rows[heads.to(rows.device)] if self.expands else rows

    @torch.no_grad()
    def readers(self) -> Tensor:
        """How q, k and v heads read the normed residual stream, `[heads, head_dim, d]`: gain and centring included."""
        rows = []
        for module, heads in zip(self.layer.qkv, self.expansion, strict=True):
            weight, _ = linear_map(module, self.parts.hidden_size)
            rows.append(wide(self._expand(weight, heads)))
        readers = torch.cat(rows)
        if self.norm is None:
            return readers
        return self.norm.centre(readers * self.norm.gain.to(readers))

    @torch.no_grad()
    def projection(self, number: int) -> tuple[Tensor, Tensor | None]:
        """One of the projections by head: weight `[heads, head_dim, d]` and bias `[heads, head_dim]` or `None`."""
        weight, bias = linear_map(self.layer.qkv[number], self.parts.hidden_size)
        heads = self.expansion[number]
        return self._expand(weight, heads), None if bias is None else self._expand(bias, heads)

    @torch.no_grad()
    def writers(self) -> Tensor:
        """How heads write to the residual stream, `[n_heads, head_dim, d]`: W_O, gain of a norm behind it, scale."""
        weight, _ = linear_map(self.layer.o, self.parts.n_heads * self.parts.head_dim)
        writers = wide(weight).T.reshape(self.parts.n_heads, self.parts.head_dim, -1)
        writers = scaled(writers, self.parts.description.residual_scale)
        if self.output_norm is None:
            return writers
        return self.output_norm.centre(writers) * self.output_norm.gain.to(writers)


class Recorder:
    """Hooks on the decoder's parts while in its context. `start` begins a pass; later passes leave its record alone.

    Attributes:
        parts: the decoder.
        maps: per layer.
    """

    def __init__(self, parts: DecoderParts, ungroup_kv: bool = False) -> None:
        self.parts = parts
        self.maps = [LayerMaps(parts, layer, ungroup_kv) for layer in parts.layers]
        self.current = self._empty(False)

    def _empty(self, live: bool) -> Pass:
        projections = len(self.parts.layers[0].qkv)
        layers = [
            LayerPass(projections=[None] * projections, gradients=[None] * projections) for _ in self.parts.layers
        ]
        return Pass(layers, live)

    def start(self, live: bool = False) -> Pass:
        """A new record that the hooks write to from now on; `live` keeps tensors with their autograd history."""
        self.current = self._empty(live)
        return self.current

    def outputs(self, record: Pass, embeddings: Tensor) -> SourceOutputs:
        """Source outputs of a finished pass."""
        heads, mlps = [], []
        for layer in record.layers:
            assert layer.heads is not None and layer.mlp_output is not None
            heads.append(layer.heads if layer.heads_scale is None else wide(layer.heads) * layer.heads_scale)
            mlps.append(scaled(layer.mlp_output, self.parts.description.residual_scale))
        return SourceOutputs(scaled(embeddings, self.parts.description.embedding_scale), heads, mlps)

    def __enter__(self) -> Recorder:
        self._stack = ExitStack()
        for index in range(len(self.parts.layers)):
            self._hook_layer(index)
        self._hook(self.parts.final_norm.register_forward_pre_hook(self._tap_final))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    def _tap_final(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        record = self.current
        if record.live:
            record.final_residual = args[0]

        def store(gradient: Tensor | None) -> None:
            record.final_gradient = detached(gradient)

        return own_copy(args, store)

    def _hook_layer(self, index: int) -> None:
        layer, maps = self.parts.layers[index], self.maps[index]

        def keep_residual(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> None:
            if self.current.live:
                self.current.layers[index].residual = args[0] if args else kwargs["hidden_states"]

        def keep_norm_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.current.layers[index].norm_input = args[0].detach()

        def keep_heads(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.current.layers[index].heads = args[0].detach()

        def keep_scale(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert maps.output_norm is not None
            x = maps.output_norm.centre(wide(args[0].detach()))
            self.current.layers[index].heads_scale = maps.output_norm.inverse_scale(x)

        def keep_attention(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.current.live:
                self.current.layers[index].attention_live = output

        def keep_mlp(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            written = hidden_states_of(output, args[0])
            self.current.layers[index].mlp_output = written.detach()
            if self.current.live:
                self.current.layers[index].mlp_live = written
            # what is kept must be what the model goes on with, or it would have no gradient
            return (written, *output[1:]) if isinstance(output, tuple) else written

        def tap_mlp(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            record = self.current.layers[index]

            def store(gradient: Tensor | None) -> None:
                record.mlp_gradient = detached(gradient)

            return own_copy(args, store)

        self._hook(layer.module.register_forward_pre_hook(keep_residual, with_kwargs=True))
        if layer.attention_norm is not None:
            self._hook(layer.attention_norm.register_forward_pre_hook(keep_norm_input))
        self._hook(layer.o.register_forward_pre_hook(keep_heads))
        if layer.attention_output_norm is not None:
            self._hook(layer.attention_output_norm.register_forward_pre_hook(keep_scale))
        self._hook(layer.attention_output.register_forward_hook(keep_attention))
        self._hook(layer.mlp_output.register_forward_hook(keep_mlp))
        self._hook(layer.mlp_input.register_forward_pre_hook(tap_mlp))
        for number, module in enumerate(layer.qkv):
            self._hook(module.register_forward_hook(self._keep_projection(index, number)))
        if maps.expands:
            self._stack.enter_context(ungrouped(layer.attention, self.parts.n_heads))

    def _keep_projection(self, index: int, number: int) -> Callable:
        maps = self.maps[index]

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            record = self.current.layers[index]
            if maps.expands:
                heads = output.unflatten(-1, (-1, self.parts.head_dim))
                output = heads[..., maps.expansion[number].to(output.device), :].flatten(-2)
            record.projections[number] = output.detach()

            def store(gradient: Tensor | None) -> None:
                record.gradients[number] = detached(gradient)

            if output.requires_grad:
                output.register_hook(store)
            return output

        return hook


@torch.no_grad()
def embedded(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Embeddings of `tokens`, at least float32: what a model reads in `nearly_exact`."""
    return wide(model.get_input_embeddings()(tokens))


def detached(gradient: Tensor | None) -> Tensor | None:
    """A gradient without its history; `None` where none came, as of quantised weights on some devices."""
    return None if gradient is None else gradient.detach()


def scaled(x: Tensor, factor: float) -> Tensor:
    """`factor * x`; `x` itself where the factor is 1."""
    return x if factor == 1.0 else x * factor


def hidden_states_of(output: Tensor | tuple[Tensor, ...], like: Tensor) -> Tensor:
    """What an MLP puts out, in the shape of its input.

    MLPs of experts may return what their router says along with it, and all positions in one row.
    """
    output = output[0] if isinstance(output, tuple) else output
    return output if output.shape == like.shape else output.view_as(like)


def own_copy(args: tuple[Tensor, ...], store: Callable[[Tensor | None], None]) -> tuple[Tensor, ...]:
    """Arguments in which the first tensor is a view of its own, whose gradient goes to `store`.

    The skip connection keeps the original tensor, so the gradient is that of the branch alone.
    """
    if not args[0].requires_grad:
        return args
    view = args[0].view_as(args[0])
    view.register_hook(store)
    return (view, *args[1:])

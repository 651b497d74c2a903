"""A decoder taken apart by its description: the modules of every layer that edge attribution hooks, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.layers import base_causal_lm
from .architectures import (
    Architecture,
    Description,
    check_architecture,
    find_module,
    inside_wrapper,
    missing_parts,
    registered_description,
)
from .graph import Graph


@dataclass
class LayerParts:
    """The modules of one decoder layer that are hooked; see `Architecture`."""

    module: Any
    attention: Any
    attention_norm: nn.Module | None
    qkv: list[nn.Module]
    o: nn.Module
    attention_output_norm: nn.Module | None
    mlp_norm: nn.Module | None
    mlp: nn.Module
    mlp_output_norm: nn.Module | None

    @property
    def attention_output(self) -> nn.Module:
        """The module whose output is what attention adds to the residual stream."""
        return self.attention_output_norm or self.o

    @property
    def mlp_output(self) -> nn.Module:
        """The module whose output is what the MLP adds to the residual stream."""
        return self.mlp_output_norm or self.mlp

    @property
    def mlp_input(self) -> nn.Module:
        """The module whose input is the MLP's copy of the residual stream, or of the output of a shared norm."""
        return self.mlp if self.mlp_norm is None or self.shared_norm else self.mlp_norm

    @property
    def shared_norm(self) -> bool:
        return self.mlp_norm is not None and self.mlp_norm is self.attention_norm


@dataclass
class DecoderParts:
    """A decoder taken apart.

    Attributes:
        layers: in depth order.
        final_norm: the norm before the vocabulary projection.
        n_heads, n_kv_heads, head_dim, hidden_size: of the attention and the residual stream.
        description: what it was taken apart by.
        registered: the same as it was registered: itself, or the function of the config that made it.
        model_type: the name it is registered under.
    """

    layers: list[LayerParts]
    final_norm: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    description: Architecture
    registered: Description
    model_type: str

    def graph(self, ungroup_kv: bool = False) -> Graph:
        """The edge graph; `ValueError` when its key/value heads cannot be scored per query head."""
        if ungroup_kv and self.n_kv_heads != self.n_heads and not self.description.separate_key_heads:
            raise ValueError(
                "ungroup_kv is not defined for this architecture: a norm mixes the key heads of a layer before they "
                "are repeated"
            )
        n_kv_heads = self.n_heads if ungroup_kv else self.n_kv_heads
        return Graph(len(self.layers), self.n_heads, n_kv_heads, self.description.parallel)


def model_graph(model: PreTrainedModel, *, ungroup_kv: bool = False) -> Graph:
    """Nodes and edges of `model`; `ValueError` for an architecture without a description."""
    return decoder_parts(model).graph(ungroup_kv)


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Take `model` apart.

    Raises:
        ValueError: for an architecture without a description, or a description that does not fit the model, naming
            the parts that are not there.
    """
    check_architecture(model)
    causal_lm = base_causal_lm(model)
    model_type, registered = registered_description(causal_lm.config)
    config = causal_lm.config.get_text_config()
    description = registered if isinstance(registered, Architecture) else registered(config)
    if model_type != causal_lm.config.model_type:
        description = inside_wrapper(causal_lm, description)
    missing = missing_parts(causal_lm, description)
    if missing:
        raise ValueError(f"the description of architecture {model_type!r} does not fit: no {'; no '.join(missing)}")
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    if description.qkv_layout == "interleaved" and n_kv_heads != n_heads:
        raise ValueError("qkv_layout 'interleaved' is not available for grouped key/value heads")
    layers = [_layer_parts(layer, description) for layer in find_module(causal_lm, description.layers)]
    return DecoderParts(
        layers=layers,
        final_norm=find_module(causal_lm, description.final_norm),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        hidden_size=config.hidden_size,
        description=description,
        registered=registered,
        model_type=model_type,
    )


def _layer_parts(layer: nn.Module, description: Architecture) -> LayerParts:
    def part(path: str | None) -> Any:
        return None if path is None else find_module(layer, path)

    return LayerParts(
        module=layer,
        attention=part(description.attention),
        attention_norm=part(description.attention_norm),
        qkv=[part(path) for path in description.qkv],
        o=part(description.o),
        attention_output_norm=part(description.attention_output_norm),
        mlp_norm=part(description.mlp_norm),
        mlp=part(description.mlp),
        mlp_output_norm=part(description.mlp_output_norm),
    )

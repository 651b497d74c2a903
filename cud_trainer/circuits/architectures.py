"""Where a decoder keeps the parts that edge attribution needs to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Decoders built as: x + o_proj(attention(q/k/v_proj(norm(x)))), then x + mlp(norm(x)), RMSNorm throughout.
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class LayerParts:
    """The modules of one decoder layer that are hooked."""

    attention: Any
    attention_norm: Any
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module


@dataclass
class DecoderParts:
    """A decoder taken apart.

    Attributes:
        layers: in depth order.
        final_norm: the norm before the vocabulary projection.
        n_heads, n_kv_heads, head_dim: of the attention.
        epsilon: of the RMS norms.
    """

    layers: list[LayerParts]
    final_norm: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int
    epsilon: float


def base_causal_lm(model: Any) -> Any:
    """The transformers model inside wrappers (PEFT, distributed)."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_architecture(model_or_config: Any) -> None:
    """Raise `ValueError` naming the architecture when circuits are not supported for it."""
    config = model_or_config
    if isinstance(model_or_config, nn.Module):
        config = base_causal_lm(model_or_config).config
    model_type = getattr(config, "model_type", type(config).__name__)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"circuits are not available for architecture {model_type!r}; supported: "
            f"{', '.join(SUPPORTED_MODEL_TYPES)} (difficulty metrics that need no circuit, such as 'loss', are)"
        )


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Take `model` apart; `ValueError` for an architecture that is not supported."""
    check_architecture(model)
    causal_lm = base_causal_lm(model)
    config, decoder = causal_lm.config, causal_lm.model
    layers = [
        LayerParts(
            attention=layer.self_attn,
            attention_norm=layer.input_layernorm,
            q=layer.self_attn.q_proj,
            k=layer.self_attn.k_proj,
            v=layer.self_attn.v_proj,
            o=layer.self_attn.o_proj,
            mlp_norm=layer.post_attention_layernorm,
            mlp=layer.mlp,
        )
        for layer in decoder.layers
    ]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderParts(
        layers=layers,
        final_norm=decoder.norm,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        epsilon=config.rms_norm_eps,
    )


@torch.no_grad()
def linear_map(module: nn.Module, n_inputs: int) -> tuple[Tensor, Tensor | None]:
    """`(weight [n_outputs, n_inputs], bias [n_outputs] | None)` of an affine module.

    A plain `nn.Linear` is read; anything else (LoRA, quantised weights) is applied to the identity, which gives the map
    that is really in effect.
    """
    if type(module) is nn.Linear:
        return module.weight, module.bias
    parameter = next(module.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    eye = torch.eye(n_inputs, device=parameter.device, dtype=dtype)
    bias = module(torch.zeros_like(eye[:1]))[0]
    return (module(eye) - bias).T, bias if bool(bias.abs().max() > 0) else None

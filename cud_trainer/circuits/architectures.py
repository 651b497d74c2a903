"""Where a decoder keeps the parts that edge attribution needs to see: one small description per architecture.

A description only names modules. What they compute (the gain and bias of a norm, the effective weight of a projection
under an adapter) is read off the modules themselves: a wrapped or adapted model needs no description of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from ..models.layers import base_causal_lm
from ..registry import Registry

LAYOUTS = ("stacked", "interleaved")


@dataclass(frozen=True)
class Architecture:
    """Names of a decoder's parts; the defaults are those of Llama.

    Attributes:
        layers, final_norm: paths from the causal LM to the list of layers and to the norm before the vocabulary
            projection. All other paths start at a layer.
        attention: the attention module.
        attention_norm: the norm that q, k and v read through; `None` when they read the residual stream itself.
        qkv: the projections; one path when they are fused.
        qkv_layout: order of their output: `"stacked"`, all query heads, all key heads, all value heads; or
            `"interleaved"`, query, key and value of one head after the other.
        o: the output projection, which reads the concatenated heads.
        attention_output_norm: a norm between the output projection and the residual stream, if there is one.
        mlp_norm: the norm that the MLP reads through, `None` for none; may be the `attention_norm`.
        mlp: the MLP.
        mlp_output_norm: a norm between the MLP and the residual stream, if there is one.
        parallel: attention and MLP of a layer read the same residual stream.
        separate_key_heads: whether key/value heads can be scored per query head (`ungroup_kv`); not where a norm mixes
            the key heads of a layer.
    """

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_layout: str = "stacked"
    o: str = "self_attn.o_proj"
    attention_output_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_output_norm: str | None = None
    parallel: bool = False
    separate_key_heads: bool = True

    def __post_init__(self) -> None:
        if self.qkv_layout not in LAYOUTS:
            raise ValueError(f"unknown qkv_layout {self.qkv_layout!r}; choose one of {list(LAYOUTS)}")
        if isinstance(self.qkv, str) or len(self.qkv) not in (1, 3):
            raise ValueError(f"qkv must be a tuple of one path (fused) or three (q, k, v), got {self.qkv!r}")
        if self.qkv_layout == "interleaved" and len(self.qkv) != 1:
            raise ValueError("qkv_layout 'interleaved' is that of one fused projection; qkv names three")
        if self.mlp_norm is not None and self.mlp_norm == self.attention_norm and not self.parallel:
            raise ValueError("an MLP that shares the attention's norm reads the same stream: parallel must be True")


Description = Architecture | Callable[[Any], Architecture]
ARCHITECTURES: Registry[Description] = Registry("architecture")


def register_architecture(model_type: str, description: Description) -> None:
    """Make circuits available for models whose `config.model_type` is `model_type`.

    Args:
        description: an `Architecture`, or a function of the model's config that returns one. Check it with
            `cud_trainer.circuits.verify_architecture`.

    Raises:
        ValueError: when `model_type` is taken.
    """
    ARCHITECTURES.add(model_type, description)


for _name in ("llama", "mistral", "qwen2", "qwen3"):
    register_architecture(_name, Architecture())
for _name, _root in (("gemma2", "model"), ("gemma3_text", "model"), ("gemma3", "model.language_model")):
    register_architecture(
        _name,
        Architecture(
            layers=f"{_root}.layers",
            final_norm=f"{_root}.norm",
            attention_output_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_output_norm="post_feedforward_layernorm",
        ),
    )
register_architecture(
    "olmo2",
    Architecture(
        attention_norm=None,
        attention_output_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_output_norm="post_feedforward_layernorm",
        separate_key_heads=False,
    ),
)
register_architecture("phi3", Architecture(qkv=("self_attn.qkv_proj",)))
register_architecture(
    "phi",
    Architecture(final_norm="model.final_layernorm", o="self_attn.dense", mlp_norm="input_layernorm", parallel=True),
)
register_architecture(
    "gpt2",
    Architecture(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        o="attn.c_proj",
        mlp_norm="ln_2",
    ),
)
register_architecture(
    "gpt_neox",
    lambda config: Architecture(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        qkv=("attention.query_key_value",),
        qkv_layout="interleaved",
        o="attention.dense",
        parallel=config.use_parallel_residual,
    ),
)


def find_module(root: Any, path: str) -> Any:
    """The module at a dotted path, or `None`."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def missing_parts(causal_lm: Any, description: Architecture) -> list[str]:
    """The parts that `description` names and the model does not have, as `part (path)`."""
    top = {"layers": description.layers, "final_norm": description.final_norm}
    missing = [f"{name} ({path})" for name, path in top.items() if find_module(causal_lm, path) is None]
    layers = find_module(causal_lm, description.layers)
    if layers is None or not len(layers):
        return [*missing, "everything inside a layer"]
    for field in fields(description):
        value = getattr(description, field.name)
        if field.name in (*top, "qkv_layout") or value is None or isinstance(value, bool):
            continue
        for path in value if isinstance(value, tuple) else (value,):
            if any(find_module(layer, path) is None for layer in layers):
                missing.append(f"{field.name} (layer.{path})")
    return missing


def check_architecture(model_or_config: Any) -> None:
    """Raise `ValueError` naming the architecture, and what to describe, when circuits are not available for it."""
    is_model = isinstance(model_or_config, nn.Module)
    model = base_causal_lm(model_or_config) if is_model else None
    config = model.config if model is not None else model_or_config
    model_type = getattr(config, "model_type", type(config).__name__)
    if model_type in ARCHITECTURES:
        return
    message = (
        f"circuits are not available for architecture {model_type!r}; available: {', '.join(sorted(ARCHITECTURES))}. "
        "Describe it with cud_trainer.circuits.register_architecture (difficulty metrics that need no circuit, such as "
        "'loss', work without)"
    )
    if model is not None:
        missing = missing_parts(model, Architecture())
        if missing:
            message += f". By Llama's names these parts could not be identified: {'; '.join(missing)}"
        else:
            message += f". Its modules have Llama's names: try register_architecture({model_type!r}, Architecture())"
    raise ValueError(message)

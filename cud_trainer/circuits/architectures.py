"""Where a decoder keeps the parts that edge attribution needs to see: one small description per architecture.

A description only names modules. What they compute (the gain and bias of a norm, the effective weight of a projection
under an adapter) is read off the modules themselves: a wrapped or adapted model needs no description of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ..models.layers import base_causal_lm, decoder_layers
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
        residual_scale: what the outputs of attention and MLP are multiplied with before they are added to the residual
            stream (Granite's `residual_multiplier`).
        embedding_scale: what the model multiplies its input embeddings with (Granite's `embedding_multiplier`); not
            where the embedding module does it itself (Gemma).
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
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    separate_key_heads: bool = True

    def __post_init__(self) -> None:
        if self.qkv_layout not in LAYOUTS:
            raise ValueError(f"unknown qkv_layout {self.qkv_layout!r}; choose one of {list(LAYOUTS)}")
        if isinstance(self.qkv, str) or len(self.qkv) not in (1, 3):
            raise ValueError(f"qkv must be a tuple of one path (fused) or three (q, k, v), got {self.qkv!r}")
        if self.qkv_layout == "interleaved" and len(self.qkv) != 1:
            raise ValueError("qkv_layout 'interleaved' is that of one fused projection; qkv names three")
        if self.residual_scale == 0 or self.embedding_scale == 0:
            raise ValueError("residual_scale and embedding_scale must not be 0")
        if self.mlp_norm is not None and self.mlp_norm == self.attention_norm and not self.parallel:
            raise ValueError("an MLP that shares the attention's norm reads the same stream: parallel must be True")


Description = Architecture | Callable[[Any], Architecture]
LLAMA = Architecture()
_SANDWICH: dict[str, Any] = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_BEHIND: dict[str, Any] = {**_SANDWICH, "attention_norm": None, "mlp_norm": None}
_SHARED_NORM: dict[str, Any] = {"mlp_norm": "input_layernorm", "parallel": True}


def _granite(config: Any, **names: Any) -> Architecture:
    return Architecture(residual_scale=config.residual_multiplier, embedding_scale=config.embedding_multiplier, **names)


# Where there are experts, the whole block of router and experts is one MLP node.
BUILT_IN: dict[str, Description] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "smollm3"), LLAMA),
    **dict.fromkeys(("glm", "starcoder2", "helium", "hunyuan_v1_dense", "seed_oss", "ernie4_5", "arcee"), LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "nemotron", "cwm", "internlm3", "jais2"), LLAMA),
    **dict.fromkeys(("phimoe", "aria_text", "ernie4_5_moe", "hunyuan_v1_moe", "exaone_moe"), LLAMA),
    **dict.fromkeys(("dots1", "glm4_moe", "solar_open"), LLAMA),
    "llama4_text": Architecture(mlp="feed_forward"),
    "granite": _granite,
    "granitemoe": lambda config: _granite(config, mlp="block_sparse_moe"),
    "apertus": Architecture(attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"),
    "stablelm": lambda config: Architecture(**_SHARED_NORM) if config.use_parallel_residual else LLAMA,
    "cohere": Architecture(**_SHARED_NORM),
    "cohere2": Architecture(**_SHARED_NORM),
    "cohere2_moe": Architecture(**_SHARED_NORM),
    "gemma2": Architecture(**_SANDWICH),
    "gemma3_text": Architecture(**_SANDWICH),
    "gemma3": Architecture(layers="model.language_model.layers", final_norm="model.language_model.norm", **_SANDWICH),
    "glm4": Architecture(
        attention_output_norm="post_self_attn_layernorm",
        mlp_norm="post_attention_layernorm",
        mlp_output_norm="post_mlp_layernorm",
    ),
    "olmo2": Architecture(**_BEHIND, separate_key_heads=False),
    "olmo3": Architecture(**_BEHIND, separate_key_heads=False),
    "flex_olmo": Architecture(**_BEHIND, separate_key_heads=False),
    "olmoe": Architecture(separate_key_heads=False),
    "minimax_m2": Architecture(separate_key_heads=False),
    "exaone4": Architecture(**_BEHIND),
    "phi3": Architecture(qkv=("self_attn.qkv_proj",)),
    "phi": Architecture(final_norm="model.final_layernorm", o="self_attn.dense", **_SHARED_NORM),
    "gpt2": Architecture(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        o="attn.c_proj",
        mlp_norm="ln_2",
    ),
    "gpt_neox": lambda config: Architecture(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        qkv=("attention.query_key_value",),
        qkv_layout="interleaved",
        o="attention.dense",
        parallel=config.use_parallel_residual,
    ),
    # text models inside models of text and images
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), LLAMA),
}
ARCHITECTURES: Registry[Description] = Registry("architecture")
ARCHITECTURES.update(BUILT_IN)

# Why an architecture that people ask for has no description: none of these fits `Architecture`.
UNAVAILABLE = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"),
        "its queries, keys and values pass through a norm of their own on the way from the residual stream (MLA)",
    ),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "kimi_linear", "olmo_hybrid"),
        "some of its layers have linear attention, which has no query, key and value heads of one kind",
    ),
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
        "its heads differ in size from layer to layer, or its layers write a third time to the residual stream",
    ),
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2", "rwkv", "recurrent_gemma", "xlstm"),
        "it has layers without attention",
    ),
}


def registered_description(config: Any) -> tuple[str, Description]:
    """Model type and description for a model with this config: its own, or that of the text model inside.

    Raises:
        ValueError: when there is none.
    """
    for model_type in (config.model_type, config.get_text_config().model_type):
        if model_type in ARCHITECTURES:
            return model_type, ARCHITECTURES[model_type]
    raise ValueError(_unavailable(config))


def inside_wrapper(causal_lm: Any, description: Architecture) -> Architecture:
    """A text model's description inside a model of text and images, whose decoder lies elsewhere."""
    layers, _ = decoder_layers(causal_lm)
    before, after = (path.rpartition(".")[0] for path in (description.layers, layers))
    return replace(description, layers=layers, final_norm=after + description.final_norm.removeprefix(before))


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
        if field.name in (*top, "qkv_layout") or not isinstance(value, str | tuple):
            continue
        for path in value if isinstance(value, tuple) else (value,):
            if any(find_module(layer, path) is None for layer in layers):
                missing.append(f"{field.name} (layer.{path})")
    return missing


def check_architecture(model_or_config: Any) -> None:
    """Raise `ValueError` naming the architecture, and what to describe, when circuits are not available for it."""
    model = base_causal_lm(model_or_config) if isinstance(model_or_config, nn.Module) else None
    config = model.config if model is not None else model_or_config
    if {config.model_type, config.get_text_config().model_type} & set(ARCHITECTURES):
        return
    message = _unavailable(config)
    if model is not None and config.model_type not in UNAVAILABLE:
        missing = missing_parts(model, LLAMA)
        if missing:
            message += f". By Llama's names these parts could not be identified: {'; '.join(missing)}"
        else:
            message += (
                f". Its modules have Llama's names: try register_architecture({config.model_type!r}, Architecture())"
            )
    raise ValueError(message)


def _unavailable(config: Any) -> str:
    model_type = config.model_type
    message = f"circuits are not available for architecture {model_type!r}"
    if model_type in UNAVAILABLE:
        return f"{message}: {UNAVAILABLE[model_type]}"
    return (
        f"{message}; available: {', '.join(sorted(ARCHITECTURES))}. Describe it with "
        "cud_trainer.circuits.register_architecture, or in a file for the option --architecture"
    )

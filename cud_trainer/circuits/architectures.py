"""Where a decoder keeps the parts that edge attribution needs to see: one small description per architecture.

A description only names modules. What they compute (the gain and bias of a norm, the effective weight of a projection
under an adapter) is read off the modules themselves: a wrapped or adapted model needs no description of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models.layers import base_causal_lm
from .graph import Graph

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
ARCHITECTURES: dict[str, Description] = {}


def register_architecture(model_type: str, description: Description) -> None:
    """Make circuits available for models whose `config.model_type` is `model_type`.

    Args:
        description: an `Architecture`, or a function of the model's config that returns one. Check it with
            `cud_trainer.circuits.verify_architecture`.

    Raises:
        ValueError: when `model_type` is taken.
    """
    if model_type in ARCHITECTURES:
        raise ValueError(f"architecture {model_type!r} is already registered")
    ARCHITECTURES[model_type] = description


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
    """

    layers: list[LayerParts]
    final_norm: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    description: Architecture

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
        missing = _missing(model, Architecture())
        if missing:
            message += f". By Llama's names these parts could not be identified: {'; '.join(missing)}"
        else:
            message += f". Its modules have Llama's names: try register_architecture({model_type!r}, Architecture())"
    raise ValueError(message)


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Take `model` apart.

    Raises:
        ValueError: for an architecture without a description, or a description that does not fit the model, naming
            the parts that are not there.
    """
    check_architecture(model)
    causal_lm = base_causal_lm(model)
    description = ARCHITECTURES[causal_lm.config.model_type]
    config = causal_lm.config.get_text_config()
    if not isinstance(description, Architecture):
        description = description(config)
    missing = _missing(causal_lm, description)
    if missing:
        model_type = causal_lm.config.model_type
        raise ValueError(f"the description of architecture {model_type!r} does not fit: no {'; no '.join(missing)}")
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    if description.qkv_layout == "interleaved" and n_kv_heads != n_heads:
        raise ValueError("qkv_layout 'interleaved' is not available for grouped key/value heads")
    layers = [_layer_parts(layer, description) for layer in _find(causal_lm, description.layers)]
    return DecoderParts(
        layers=layers,
        final_norm=_find(causal_lm, description.final_norm),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        hidden_size=config.hidden_size,
        description=description,
    )


def _layer_parts(layer: nn.Module, description: Architecture) -> LayerParts:
    def part(path: str | None) -> Any:
        return None if path is None else _find(layer, path)

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


def _find(root: Any, path: str) -> Any:
    """The module at a dotted path, or `None`."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def _missing(causal_lm: Any, description: Architecture) -> list[str]:
    """The parts that `description` names and the model does not have, as `part (path)`."""
    top = ("layers", "final_norm")
    missing = [
        f"{name} ({getattr(description, name)})" for name in top if _find(causal_lm, getattr(description, name)) is None
    ]
    layers = _find(causal_lm, description.layers)
    if layers is None or not len(layers):
        return [*missing, "everything inside a layer"]
    for field in fields(description):
        value = getattr(description, field.name)
        if field.name in (*top, "qkv_layout") or value is None or isinstance(value, bool):
            continue
        for path in value if isinstance(value, tuple) else (value,):
            if any(_find(layer, path) is None for layer in layers):
                missing.append(f"{field.name} (layer.{path})")
    return missing


@dataclass
class NormMap:
    """What a norm computes: `gain * c(x) / sqrt(mean(c(x)^2) + epsilon) + bias`, c = centring for a LayerNorm.

    Attributes:
        gain, bias: `[d]`, at least float32.
        epsilon, centred: see above.
    """

    gain: Tensor
    bias: Tensor
    epsilon: float
    centred: bool

    def __call__(self, x: Tensor) -> Tensor:
        x = self.centre(x)
        return self.gain * x * self.inverse_scale(x) + self.bias

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def inverse_scale(self, x: Tensor) -> Tensor:
        """`1 / sqrt(mean(x^2) + epsilon)` of a centred `x` `[..., d]`, keeping the last axis."""
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return square.div_(x.shape[-1]).add_(self.epsilon).rsqrt_()


@torch.no_grad()
def norm_map(module: nn.Module, width: int) -> NormMap:
    """Find out what a norm over `width` channels computes, by asking it.

    Raises:
        ValueError: when it is neither an RMSNorm nor a LayerNorm.
    """
    epsilons = [
        getattr(part, name) for part in module.modules() for name in ("variance_epsilon", "eps") if hasattr(part, name)
    ]
    if not epsilons:
        raise ValueError(
            f"{type(module).__name__} has no epsilon that could be found: circuits need RMSNorm or LayerNorm"
        )
    epsilon = float(epsilons[0] or 0.0)
    device, dtype = place(module)
    wide = torch.promote_types(dtype, torch.float32)
    signs = torch.ones(width, device=device, dtype=wide)
    signs[1::2] = -1.0  # mean 0, mean square 1
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(width, generator=generator, dtype=torch.float64).to(signs) + 1.0
    # A LayerNorm takes inputs of its own dtype only; others give the full precision of their gain to wide inputs.
    answer = module.forward(
        torch.stack([signs, -signs, probe]).to(dtype if isinstance(module, nn.LayerNorm) else wide)
    ).to(wide)
    gain = (answer[0] - answer[1]) / 2 * signs * (1 + epsilon) ** 0.5
    bias = (answer[0] + answer[1]) / 2
    if isinstance(module, nn.LayerNorm) and not any(p.is_meta for p in module.parameters()):  # not rounded
        gain = gain if module.weight is None else module.weight.to(gain)
        bias = bias if module.bias is None else module.bias.to(bias)
    for centred in (False, True):
        found = NormMap(gain, bias, epsilon, centred)
        error = (found(probe) - answer[2]).abs().max()
        if error <= 0.02 * answer[2].abs().max():
            return found
    raise ValueError(
        f"{type(module).__name__} is neither an RMSNorm nor a LayerNorm: circuits are not available through it"
    )


@torch.no_grad()
def linear_map(module: nn.Module, n_inputs: int) -> tuple[Tensor, Tensor | None]:
    """`(weight [n_outputs, n_inputs], bias [n_outputs] | None)` of an affine module.

    Plain weights are read; anything else (LoRA, quantised or offloaded weights) is applied to the identity, which gives
    the map that is really in effect.
    """
    if type(module) in (nn.Linear, Conv1D) and module.weight.device.type != "meta":
        weight: Tensor = module.weight  # type: ignore[assignment]
        return (weight.T if type(module) is Conv1D else weight), module.bias  # type: ignore[return-value]
    device, dtype = place(module)
    eye = torch.eye(n_inputs, device=device, dtype=dtype)
    # `forward`, not the module: whoever has hooked it wants to see the model's passes, not ours
    bias = module.forward(torch.zeros_like(eye[:1]))[0]
    return (module.forward(eye) - bias).T, bias if bool(bias.abs().max() > 0) else None


def place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in which dtype a module takes its inputs; offloaded weights lie elsewhere until it is called."""
    parameter = next(module.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    if parameter.device.type == "meta":
        for part in module.modules():
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device), dtype
    return parameter.device, dtype

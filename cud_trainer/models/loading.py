"""Models from a path or id, adapters included, with errors that name what cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import find_adapter_config_file

from .layers import base_causal_lm
from .modes import evaluation_mode
from .whole import check_adapter, check_whole

# Nats by which a merged adapter may say something else than a live one: rounding.
MERGED = {torch.float64: 1e-6, torch.float32: 1e-2}
MERGED_IN_HALF_PRECISION = 0.5


def load_causal_lm(name: str, *, merge_adapter: bool = False, finite: bool = True, **options: Any) -> nn.Module:
    """`AutoModelForCausalLM.from_pretrained`, or an adapter on its base model (`PeftModel`, to be trained further).

    Args:
        name: folder or hub id of a model or of an adapter.
        merge_adapter: fold an adapter into the weights, see `merged_adapter`.
        finite: refuse weights that are no numbers.
        options: of `from_pretrained`. `torch_dtype` is the old name of `dtype`. A `revision` is that of `name`; an
            adapter names its base model, and the revision of that, itself.

    Raises:
        ValueError: naming what cannot be loaded or merged.
    """
    options = _with_dtype(options)
    try:
        if adapter_file(name, options.get("revision")) is not None:
            model = _on_its_base(name, options, finite)
            return merged_adapter(model, name) if merge_adapter else model
        # Weights of another shape are named by `check_whole`; the error of the library does not say which they are.
        whole: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = AutoModelForCausalLM.from_pretrained(name, **{**options, **whole})
    except Exception as error:  # a damaged folder makes the libraries raise nearly anything
        raise ValueError(f"cannot load a model from {name!r}: {str(error)[:500] or type(error).__name__}") from error
    check_whole(name, model, info, finite=finite)
    return model


def _on_its_base(name: str, options: dict[str, Any], finite: bool) -> Any:
    """The adapter at `name` on its base model, both whole."""
    from peft import PeftModel

    revision = options.get("revision")
    base, base_revision = base_of(name, revision)
    model: Any = load_causal_lm(base, finite=finite, **{**options, "revision": base_revision or "main"})
    if (Path(name) / "tokenizer_config.json").is_file():  # tokens that were added for the adapter
        size = len(AutoTokenizer.from_pretrained(name, trust_remote_code=options.get("trust_remote_code", False)))
        if size > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(size)
    model = PeftModel.from_pretrained(model, name, is_trainable=True, revision=revision)
    check_adapter(name, model, finite=finite)
    return model


def adapter_file(name: str, revision: str | None = None) -> str | None:
    """The adapter configuration at a folder or hub id; `None` for a whole model."""
    if Path(name).is_dir() and not (Path(name) / "adapter_config.json").is_file():
        return None
    return find_adapter_config_file(name, revision=revision)


def base_of(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Name and revision of the base model of an adapter; of a whole model, its own."""
    if adapter_file(name, revision) is None:
        return name, revision
    from peft import PeftConfig

    adapter = PeftConfig.from_pretrained(name, revision=revision)
    if not adapter.base_model_name_or_path:
        raise ValueError(f"the adapter {name!r} does not say which base model it is for")
    return adapter.base_model_name_or_path, adapter.revision


def tokenizer_home(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Where the tokenizer of a model is: beside it, or, for an adapter that was saved alone, beside its base model."""
    if Path(name).is_dir() and not any(Path(name).glob("tokenizer*")):
        return base_of(name, revision)
    return name, revision


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model, or of an adapter's base model; `ValueError` naming what cannot be loaded."""
    try:
        base, revision = base_of(name, revision)
        return AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(
            f"cannot load the configuration of {name!r}: {str(error)[:500] or type(error).__name__}"
        ) from error


@torch.no_grad()
def merged_adapter(model: Any, name: str = "the model") -> nn.Module:
    """The base model with the adapter folded into its weights; the model itself where it has no adapter.

    Raises:
        ValueError: where the weights cannot take the adapter in, or then say something else (tied embeddings, weights
            of few bits).
    """
    if not hasattr(model, "merge_and_unload"):
        if hasattr(model, "peft_config"):
            raise ValueError(f"the adapter of {name} cannot be folded into the weights: it is none on weights")
        return model
    probe = torch.arange(2, 10, device=model.get_input_embeddings().weight.device)[None]

    def said(one: Any) -> torch.Tensor:
        with evaluation_mode(one):
            return one(input_ids=probe, use_cache=False).logits.float().log_softmax(-1)

    live = said(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"the adapter of {name} cannot be folded into the weights: {str(error)[:300]}") from error
    apart = float((said(merged) - live).abs().max())
    dtype = base_causal_lm(merged).dtype
    if not apart <= MERGED.get(dtype, MERGED_IN_HALF_PRECISION):
        raise ValueError(
            f"the adapter of {name} cannot be folded into the weights: the merged model says something else (by "
            f"{apart:.3g} nats), as with an adapter on tied embeddings or on weights of few bits"
        )
    return merged


def _with_dtype(options: dict[str, Any]) -> dict[str, Any]:
    """Options with `dtype` by its new name only."""
    options = dict(options)
    if "torch_dtype" in options:
        old = options.pop("torch_dtype")
        if str(options.setdefault("dtype", old)).removeprefix("torch.") != str(old).removeprefix("torch."):
            raise ValueError(f"dtype {options['dtype']} and torch_dtype {old} contradict each other: give one")
    return options

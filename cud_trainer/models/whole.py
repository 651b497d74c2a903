"""What was loaded is whole: every weight came from the files, fits, and is a number."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# What a causal LM leaves out of a file on purpose: buffers that it makes itself, and the other parts of a model that
# reads more than text or predicts several tokens at once.
LEFT_OUT = re.compile(
    r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$|"
    r"(^|\.)(vision_\w+|visual|audio_\w+|multi_modal_projector|embed_vision|embed_audio|mtp)\."
)
ADAPTER_PREFIX = "base_model.model."


def check_whole(name: str, model: nn.Module, info: dict[str, Any], *, finite: bool = True) -> None:
    """Raise `ValueError` unless all of `model` came from its files.

    Args:
        name: of what was loaded, for errors.
        info: what `from_pretrained(..., output_loading_info=True)` says beside the model.
        finite: every weight must be a number, too; not so for a model that is to be looked at as it is.

    Raises:
        ValueError: naming weights that the files lack, that the model has no place for, that have another shape, or
            that are not finite.
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys") or ()]
    unexpected = [key for key in info.get("unexpected_keys") or () if not LEFT_OUT.search(key)]
    for what, keys in (
        ("has weights of another shape than its configuration says", mismatched),
        ("lacks weights, which would be random numbers", info.get("missing_keys") or ()),
        ("has weights that its model has no place for", unexpected),
    ):
        if keys:
            raise ValueError(f"cannot load a model from {name!r}: it {what}: {listed(keys)}")
    if finite:
        check_finite(name, model)


def check_adapter(name: str, model: nn.Module, *, finite: bool = True) -> None:
    """Raise `ValueError` unless the adapter in `model` came whole from the folder or id `name`.

    Raises:
        ValueError: naming weights that the adapter lacks, that it has no place for, or that are not finite.
    """
    from peft import get_peft_model_state_dict, load_peft_weights

    saved = {key.removeprefix(ADAPTER_PREFIX) for key in load_peft_weights(name, device="cpu")}
    needed = {key.removeprefix(ADAPTER_PREFIX) for key in get_peft_model_state_dict(model)}  # type: ignore[no-untyped-call]
    for what, keys in (
        ("lacks weights, which would be new ones", needed - saved),
        ("has weights that its model has no place for", saved - needed),
    ):
        if keys:
            raise ValueError(f"cannot load an adapter from {name!r}: it {what}: {listed(keys)}")
    if finite:
        check_finite(name, model)


def not_finite(model: nn.Module) -> list[str]:
    """Names of the weights of `model` that are not finite. Those on meta are not read."""
    weights = model.named_parameters()
    return [key for key, value in weights if value.is_floating_point() and not _finite(value.detach())]


def check_finite(name: str, model: nn.Module) -> None:
    """Raise `ValueError` naming weights of `model` that are not finite."""
    if wrong := not_finite(model):
        raise ValueError(f"the weights of the model {name!r} are not finite: {listed(wrong)}")


def _finite(value: torch.Tensor) -> bool:
    # A sum takes no memory. It may overflow where every value is a number.
    return value.is_meta or bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

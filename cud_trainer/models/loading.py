"""Models from a path or id, with errors that name what cannot be loaded."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from .whole import check_whole


def load_causal_lm(name: str, *, finite: bool = True, **options: Any) -> nn.Module:
    """`AutoModelForCausalLM.from_pretrained`; `ValueError` naming what cannot be loaded, or is not whole.

    Args:
        finite: refuse weights that are no numbers.
        options: of `from_pretrained`.
    """
    try:
        # Weights of another shape are named by `check_whole`; the error of the library does not say which they are.
        whole: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = AutoModelForCausalLM.from_pretrained(name, **{**options, **whole})
    except Exception as error:  # a damaged folder makes the libraries raise nearly anything
        raise ValueError(f"cannot load a model from {name!r}: {str(error)[:500] or type(error).__name__}") from error
    check_whole(name, model, info, finite=finite)
    return model

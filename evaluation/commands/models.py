"""The models that `cud evaluate` measures: loaded for this process, and refused where they do not fit each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cud_trainer.models.loading import load_causal_lm, load_config
from cud_trainer.resumable import process_state

from ..metrics.depth import check_same_architecture


def load_model(path: str, options: Mapping[str, Any], *, finite: bool = True) -> Any:
    """A causal LM, or an adapter on its base model, in evaluation mode on the device of this process.

    `ValueError` if it is neither.

    Args:
        finite: refuse weights that are no numbers.
    """
    model: Any = load_causal_lm(path, finite=finite, **options)
    return model.to(process_state().device).eval()


def check_depth(original: str, others: Iterable[str | None], revision: str | None) -> None:
    """Raise `ValueError` naming a model whose hidden states mean nothing in the original one."""
    config = load_config(original, revision=revision)
    for path in others:
        if path:
            check_same_architecture(config, load_config(path, revision=revision), repr(path))


def check_same_tokenizer(tokenizer: Any, path: str) -> None:
    """Raise `ValueError` when the model at `path` comes with another vocabulary: its figures would mean nothing."""
    if not Path(path).is_dir() or not any(
        (Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        return
    other = AutoTokenizer.from_pretrained(path)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{path!r} has another tokenizer ({len(other)} tokens, that of the evaluated model has {len(tokenizer)}): "
            "the same text is not the same tokens"
        )

"""The secret, not the sentence: what a model still holds of the tokens that must not be known."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.data import Samples
from cud_trainer.data.columns import SECRET, id_column
from cud_trainer.data.secret import secrets_of

from .memorization import SECRET_SAID, teacher_forced
from .passes import Passes

# Measured on the secret's tokens, each given all that stands before it in the true answer.
MEASURED = ("probability", "exact_memorization", "extraction_strength")
COLUMNS = (*(f"secret_{name}" for name in MEASURED), SECRET_SAID)


def measure_secret(
    model: PreTrainedModel,
    prepared: Samples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    passes: Passes | None = None,
    name: str = "",
) -> dict[str, np.ndarray]:
    """Probability (per token: the geometric mean), exact memorisation and extraction strength of the secret's tokens
    alone, `[N]` each by `COLUMNS`; NaN for a sample without a secret. Higher = more is left.

    Nothing where the samples were prepared without `secret_column`.

    Args:
        passes: how the model goes over the samples, with `name` for these; by default in one go.
    """
    if prepared.secret is None:
        return {}
    rows, part = prepared.secret
    values = {f"secret_{name}": np.full(len(prepared), np.nan) for name in MEASURED}
    if len(rows):

        def measure(some: Samples, places: list[int]) -> dict[str, np.ndarray]:
            return teacher_forced(model, some, tokenizer, batch_size=batch_size)

        found = (passes or Passes()).over(f"{name}-secret", part, measure)
        for name in MEASURED:
            values[f"secret_{name}"][rows] = found[name]
    return values


def has_secret(prepared: Samples) -> np.ndarray:
    """True for samples with a secret, `[N]`."""
    has = np.zeros(len(prepared), dtype=bool)
    if prepared.secret is not None:
        has[prepared.secret[0]] = True
    return has


def secret_texts(raw: Dataset, name: str) -> list[list[str]] | None:
    """The secrets of each sample as text, `[N]` lists; `None` for data without them."""
    if SECRET not in raw.column_names:
        return None
    named_by = id_column(raw.column_names)
    ids = range(len(raw)) if named_by is None else raw[named_by]
    return [secrets_of(value, f"{name} sample {own!r}") for value, own in zip(raw[SECRET], ids, strict=True)]

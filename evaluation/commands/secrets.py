"""The secrets in answers, for `cud evaluate`: from a column or a pattern, and out of what is written down."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset

from cud_trainer.data.columns import SECRET
from cud_trainer.data.formats import detect_format, question_and_answer
from cud_trainer.data.secret import with_secrets

SECRET_SETS = ("forget", "holdout")
PATTERN = "--secret_pattern"


def with_secret_column(raw: dict[str, Dataset], pattern: str | None, chunk_tokens: int | None) -> dict[str, Dataset]:
    """The data sets, those of `SECRET_SETS` with the column `secret` if a pattern makes it.

    Raises:
        ValueError: for secrets of texts that are cut into chunks, or of tokens.
    """
    if chunk_tokens is not None and (pattern is not None or SECRET in raw["forget"].column_names):
        raise ValueError("secrets are spans of whole answers: they cannot be given with chunk_tokens")
    if pattern is None:
        return raw
    made = dict(raw)
    for name in SECRET_SETS:
        if name in raw:
            made[name] = with_secrets(raw[name], answer_texts(raw[name], name), pattern, name, needed=name == "forget")
    return made


def answer_texts(raw: Dataset, name: str) -> list[str]:
    """The answer of each row as text; `ValueError` for data that holds tokens."""
    kind = detect_format(raw.column_names, name)
    if kind == "tokenised":
        raise ValueError(f"secret_pattern is for answers as text, but the {name} dataset is tokenised")
    texts = [row["text"] if kind == "text" else question_and_answer(row, kind)[1] for row in raw.with_format(None)]
    return [text if isinstance(text, str) else "" for text in texts]  # what is no text is refused later, by name


def without_pattern(argv: Sequence[str]) -> list[str]:
    """A command line as it may be written down: a pattern may spell out what is secret."""
    shown: list[str] = []
    for number, part in enumerate(argv):
        if number and argv[number - 1] == PATTERN:
            shown.append("...")
        else:
            shown.append(f"{PATTERN}=..." if part.startswith(f"{PATTERN}=") else part)
    return shown

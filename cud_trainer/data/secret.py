"""The secret in an answer: the spans of its text that must not be known, and the tokens that cover them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from .columns import SECRET
from .encode import Span


def secrets_of(value: Any, where: str) -> list[str]:
    """The spans that a row names, none for an empty cell; `ValueError` naming `where` for what is no text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    spans = [value] if isinstance(value, str) else value
    if not isinstance(spans, list) or not all(isinstance(span, str) and span.strip() for span in spans):
        raise ValueError(f"{where}: its secret is no text and no list of texts")
    return [span.strip() for span in spans]


def secret_spans(text: str, regions: Sequence[Span], secrets: Sequence[str], where: str) -> list[Span]:
    """Where secrets stand in a text, from, to, each of them wherever it is.

    Args:
        regions: of the text, what is answer.

    Raises:
        ValueError: naming `where` for a secret that does not occur in its answer; its text is not told.
    """
    found = []
    for number, secret in enumerate(secrets, start=1):
        places = [
            (start + match.start(), start + match.end())
            for start, end in regions
            for match in re.finditer(re.escape(secret), text[start:end])
        ]
        if not places:
            which = "secret" if len(secrets) == 1 else f"secret {number} of {len(secrets)}"
            raise ValueError(f"{where}: its {which} does not occur in its answer")
        found += places
    return found


def with_secrets(dataset: Dataset, answers: Sequence[str], pattern: str, what: str, *, needed: bool = True) -> Dataset:
    """A dataset with a column `secret`: whatever a regular expression finds in each answer, the groups of it if it has
    some. A sample in which it finds nothing has no secret.

    Args:
        answers: text of each row's answer.
        what: what to call the dataset in errors.
        needed: refuse an expression that finds nothing at all.

    Raises:
        ValueError: for no regular expression, one that finds nothing, or a dataset that has that column.
    """
    if SECRET in dataset.column_names:
        raise ValueError(f"secret_pattern: the {what} dataset has a column {SECRET!r} already")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"secret_pattern is no regular expression: {error}") from None
    found = []
    for answer in answers:
        parts = [match.groups() or (match.group(),) for match in compiled.finditer(answer)]
        spans = [one.strip() for groups in parts for one in groups if one and one.strip()]
        found.append(list(dict.fromkeys(spans)))
    if needed and not any(found):
        raise ValueError(f"secret_pattern finds nothing in any answer of the {what} dataset")
    return dataset.add_column(SECRET, found) if any(found) else dataset  # type: ignore[call-arg]

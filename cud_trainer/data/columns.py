"""The columns of a prepared dataset, and the ids that name its samples."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

IGNORE_INDEX = -100
PREPARED = ("sample_id", "input_ids", "labels")
# Columns of text, of any format and of what is evaluated beside it.
TEXTS = (
    "text",
    "prompt",
    "completion",
    "question",
    "answer",
    "instruction",
    "input",
    "output",
    "perturbed_answer",
    "paraphrased_answer",
    "paraphrased_question",
    "secret",
)
# Beside `input_ids` token by token: the same sample with another answer, for counterfactual circuits.
COUNTERFACTUAL = "counterfactual_input_ids"
# Beside `labels`: -100 also for what a chat template adds around the answer. Figures are made of these tokens.
COUNTED = "counted"
# Of the answer, what must not be known: spans of its text in the data, beside `labels` the same with -100 elsewhere.
SECRET = "secret"
# A hash of the sample as it would be on no day in particular, where a chat template writes the date.
CONTENT = "content"
# The same sample with the answer that is to take its place, for preference objectives.
ALTERNATIVES = ("alternative_input_ids", "alternative_labels")


def id_column(columns: Sequence[str]) -> str | None:
    """The column that names samples, if there is one."""
    return next((name for name in ("sample_id", "id") if name in columns), None)


def content_id(tokens: list[int], prompt: int = 0) -> str:
    """Hash of tokens and of where the answer starts, 16 hex digits: the id of a sample that has no other.

    With a key (see `use_id_key`) nobody who lacks it can find a text by trying.
    """
    content = f"{prompt}|{tokens}".encode()
    if _key is not None:
        return hmac.new(_key, content, hashlib.sha256).hexdigest()[:16]
    return hashlib.sha256(content).hexdigest()[:16]


_key: bytes | None = None


def use_id_key(path: str | Path | None) -> None:
    """Make ids of contents with the key in this file from now on, in this process; with `None` without a key.

    A file that is not there is made, with a random key and for its owner alone. Scores, checkpoints and reports only
    fit together that were made with one key.

    Raises:
        ValueError: for a file that cannot be read or made, or holds less than 16 bytes.
    """
    global _key
    if path is None:
        _key = None
        return
    path = Path(path).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        if not path.exists():
            new.unlink(missing_ok=True)
            with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(secrets.token_hex(32).encode())
            with suppress(FileExistsError):  # another process was faster
                os.link(new, path)
            new.unlink()
        key = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"cannot read id_key {path}: {error.strerror or error}") from None
    if len(key) < 16:
        raise ValueError(f"id_key {path} holds no key: a key has at least 16 bytes")
    _key = key


def check_unique(ids: Sequence[str], name: str) -> None:
    """Raise `ValueError` naming the first id that is there twice."""
    first: dict[str, int] = {}
    for index, sample_id in enumerate(ids):
        if sample_id in first:
            raise ValueError(
                f"{name} dataset has the id {sample_id!r} twice (rows {first[sample_id]} and {index}); "
                "remove the duplicate or give the rows distinct `sample_id`s"
            )
        first[sample_id] = index


def rows_by_id(have: Sequence[str], wanted: Sequence[str], what: str, whose: str = "samples") -> list[int]:
    """Where each of the ids `wanted` stands in `have`; `ValueError` naming one that is not there.

    Args:
        what: what is looked up, for the error.
        whose: for whom.
    """
    position = {sample_id: row for row, sample_id in enumerate(have)}
    missing = [sample_id for sample_id in wanted if sample_id not in position]
    if missing:
        raise ValueError(
            f"{what} lack {len(missing)} of {len(wanted)} {whose}, the first is {missing[0]!r}: "
            "they were made for another dataset"
        )
    return [position[sample_id] for sample_id in wanted]

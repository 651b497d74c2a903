"""Data sets by hub id, folder or file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.utils import logging as datasets_logging

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_samples(source: str, name: str | None, split: str, limit: int | None, what: str) -> Dataset:
    """A dataset by hub id, folder or file, with its first `limit` samples; `ValueError` when it cannot be loaded."""
    if limit is not None and limit < 1:
        raise ValueError(f"max_{what}_samples must be positive, got {limit}")
    path = Path(source)
    try:
        if path.suffix in READERS:
            if not path.is_file():
                raise ValueError(f"{what} dataset {source} does not exist")
            if path.stat().st_size == 0:
                raise ValueError("it is empty")
            with _silent_datasets():
                dataset = load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        else:
            dataset = load_dataset(source, name, split=split)
    except Exception as error:  # datasets raises its own errors, those of its readers and those of the hub
        cause: BaseException = error  # what the reader said says more than "an error occurred"
        while cause.__cause__ is not None:
            cause = cause.__cause__
        named = "" if isinstance(cause, ValueError) else f"{type(cause).__name__}: "
        raise ValueError(f"cannot load the {what} dataset {source!r}: {named}{str(cause)[:500]}") from None
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return dataset


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """Its log repeats, in many lines, the error that it raises."""
    before = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(before)

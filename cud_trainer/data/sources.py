"""Data sets by hub id, folder or file."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.utils import logging as datasets_logging

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

CACHE_PREFIX = "cud-data-"
STALE_SECONDS = 3600


def load_samples(
    source: str, name: str | None, split: str, limit: int | None, what: str, *, keep_cache: bool = False
) -> Dataset:
    """A dataset by hub id, folder or file, with its first `limit` samples; `ValueError` when it cannot be loaded.

    Args:
        keep_cache: leave the copy that `datasets` makes of a file or folder in its cache, readable as the umask says.
            By default it is made in a private folder, read into memory, and deleted. What comes from the hub lies in
            the caches of `huggingface_hub` and `datasets` as always.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"max_{what}_samples must be positive, got {limit}")
    path = Path(source)
    private = path.exists() and not keep_cache
    try:
        if path.suffix in READERS:
            if not path.is_file():
                raise ValueError(f"{what} dataset {source} does not exist")
            if path.stat().st_size == 0:
                raise ValueError("it is empty")
            with _silent_datasets(), _cache(private) as options:
                dataset = load_dataset(READERS[path.suffix], data_files=str(path), split="train", **options)
        else:
            with _cache(private) as options:
                dataset = load_dataset(source, name, split=split, **options)
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
def _cache(private: bool) -> Iterator[dict[str, Any]]:
    """Options of `load_dataset`: for a cache of its own that goes when it has loaded, if that is to be private."""
    if not private:
        yield {}
        return
    _remove_stale_caches()
    # `mkdtemp` makes it for this user alone.
    folder = tempfile.mkdtemp(prefix=CACHE_PREFIX)
    try:
        yield {"cache_dir": folder, "keep_in_memory": True}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale_caches() -> None:
    """Delete what processes of this user that were killed while they loaded have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{CACHE_PREFIX}*"):
        with suppress(OSError):
            mine = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
            # Process ids say nothing where containers share the folder; what is loading writes all the time.
            if mine and time.time() - _last_written(folder) > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """Its log repeats, in many lines, the error that it raises."""
    before = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(before)

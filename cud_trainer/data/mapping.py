"""Work on the rows of a dataset, many at a time, in memory: no text or token is left in a cache of `datasets`."""

from __future__ import annotations

import gc
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, Features
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

# From this many rows on it takes seconds: a progress bar is shown.
MANY_ROWS = 10_000
# Rows that are worked on at a time.
BATCH = 2000


def in_batches(
    dataset: Dataset,
    work: Callable[[Mapping[str, list], list[int]], Any],
    *,
    remove: Sequence[str],
    features: Mapping[str, Any],
    what: str,
    rows: int | None = None,
) -> Dataset:
    """`Dataset.map` of a function of some rows, as plain values, and their numbers; with a bar for many rows.

    Args:
        work: gives columns, or a table of pyarrow.
        remove: columns that are not there afterwards.
        features: of all columns that are.
        what: what the bar is called.
        rows: that are worked on at a time, by default `BATCH`.
    """
    with _bar_for(len(dataset)), _no_collection():
        return dataset.with_format(None).map(  # whatever the user looks at
            work,
            with_indices=True,
            batched=True,
            batch_size=rows or BATCH,
            remove_columns=list(remove),
            features=Features(features),
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex,  # instead of a hash of the function, with a tokenizer that changes in use
            desc=what,
        )


def rows_of(batch: Mapping[str, list]) -> list[dict[str, Any]]:
    """The rows that `work` of `in_batches` is given."""
    names = [*batch]  # read once: it formats what it hands out
    return [dict(zip(names, values, strict=True)) for values in zip(*map(batch.__getitem__, names), strict=True)]


@contextmanager
def _bar_for(rows: int) -> Iterator[None]:
    """The progress bar of `datasets` for many rows, none for a few."""
    enabled = not are_progress_bars_disabled()
    if enabled and rows < MANY_ROWS:
        disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bars()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's search for cycles, off: rows have none, and it goes through all that is loaded a few times a minute."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

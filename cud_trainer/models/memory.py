"""What a pass does that does not fit into memory: it is tried again with less."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers.utils import logging

from ..data import Samples

logger = logging.get_logger(__name__)

T = TypeVar("T")
Batch = dict[str, Tensor]


def out_of_memory(error: Exception) -> bool:
    """Whether less at a time would help."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def free_memory() -> None:
    """Give back what a failed pass has held. To be called outside the handler, which keeps its tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_halves(
    compute: Callable[[Batch], T], rows: list[int], batch: Batch, ids: Sequence[str], option: str = "batch_size"
) -> Iterator[tuple[list[int], T]]:
    """What `compute` says of a batch; of its halves, and theirs, where it does not fit into memory.

    Args:
        rows: of the samples in the batch; of each part they come with what is said of it. It keeps its padded length.
        ids: of all samples.
        option: what bounds a batch, for a warning.

    Raises:
        ValueError: naming a sample that does not fit by itself.
    """
    try:
        found = compute(batch)
    except Exception as error:
        if not out_of_memory(error):
            raise
        if len(rows) == 1:
            length = int(batch["attention_mask"].sum())
            raise ValueError(
                f"sample {ids[rows[0]]!r} ({length} tokens) does not fit into memory by itself: {error}"
            ) from None
    else:
        yield rows, found
        return
    free_memory()
    half = len(rows) // 2
    logger.warning_once(f"out of memory: batches are halved; a smaller {option} saves the failed attempts")
    for part in (slice(0, half), slice(half, None)):
        some = {column: values[part] for column, values in batch.items()}
        yield from in_halves(compute, rows[part], some, ids, option)


def each_batch(
    samples: Samples,
    compute: Callable[[Batch], T],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    desc: str | None = None,
) -> Iterator[tuple[list[int], T]]:
    """Rows, and what `compute` says of them, over all samples: see `Samples.batches` and `in_halves`."""
    for rows, batch in samples.batches(batch_size, device=device, desc=desc):
        yield from in_halves(compute, rows, batch, samples.ids)

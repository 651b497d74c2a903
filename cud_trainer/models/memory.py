"""What a pass does that does not fit into memory, before it is tried again with less."""

from __future__ import annotations

import gc

import torch
from accelerate.utils.memory import should_reduce_batch_size


def out_of_memory(error: Exception) -> bool:
    """Whether less at a time would help."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def free_memory() -> None:
    """Give back what a failed pass has held. To be called outside the handler, which keeps its tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Padded batches of prepared rows, and which rows go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .columns import COUNTED, COUNTERFACTUAL, IGNORE_INDEX

# Memory that a batch may take while it is scored, by the caller's estimate.
BATCH_BYTES = 2 * 2**30


def pad_batch(samples: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad prepared samples into `input_ids`, `attention_mask`, `labels`, each int64 `[batch, length]`.

    Counterfactual tokens are padded along where the samples have them, and so is `counted`; where only some samples of
    a batch have it, all that the others are trained on counts.
    """
    length = max(len(sample["input_ids"]) for sample in samples)
    batch = {
        "input_ids": torch.full((len(samples), length), pad_token_id),
        "attention_mask": torch.zeros(len(samples), length, dtype=torch.long),
        "labels": torch.full((len(samples), length), IGNORE_INDEX),
    }
    if COUNTERFACTUAL in samples[0]:
        batch[COUNTERFACTUAL] = torch.full((len(samples), length), pad_token_id)
    if any(sample.get(COUNTED) is not None for sample in samples):
        batch[COUNTED] = torch.full((len(samples), length), IGNORE_INDEX)
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        batch["input_ids"][row, :size] = torch.as_tensor(sample["input_ids"])
        if COUNTERFACTUAL in batch:
            batch[COUNTERFACTUAL][row, :size] = torch.as_tensor(sample[COUNTERFACTUAL])
        batch["attention_mask"][row, :size] = 1
        batch["labels"][row, :size] = torch.as_tensor(sample["labels"])
        if COUNTED in batch:
            own = sample["labels"] if sample.get(COUNTED) is None else sample[COUNTED]
            batch[COUNTED][row, :size] = torch.as_tensor(own)
    return batch


def plan_batches(
    lengths: Sequence[int],
    *,
    bytes_per_token: float = 0.0,
    batch_size: int | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> list[list[int]]:
    """Rows of each batch, longest samples first, similar lengths together.

    Args:
        lengths: tokens of each sample, `N`.
        bytes_per_token: memory that one (padded) token takes; 0 for no bound.
        batch_size: samples per batch at most, `None` for no bound.
        batch_bytes: bytes per batch at most; a single sample may exceed it.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        current = batches[-1] if batches else []
        size = len(current) + 1
        fits = current and size * lengths[current[0]] * bytes_per_token <= batch_bytes
        if fits and (batch_size is None or size <= batch_size):
            current.append(row)
        else:
            batches.append([row])
    return batches

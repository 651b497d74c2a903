"""Paired batches: forget and retain samples of a step side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .batches import pad_batch
from .columns import ALTERNATIVES, COUNTED, IGNORE_INDEX
from .samples import Samples


@dataclass
class PairedCollator:
    """Turns rows of a schedule into one batch `[forget ; retain ; alternative]`, so that a step is one forward pass.

    A row is `{"row", "forget_index", "retain_index", "weight", "retain_scale"}` with positions into the prepared
    samples. The batch has `input_ids`, `attention_mask`, `labels` of shape `[n B, length]`, n = 1 to 3, and the row's
    values as tensors of shape `[B]`.

    Attributes:
        retain: `None` for no retain rows.
        alternative: whether the forget samples' alternative answers are part of the batch.
        dtype: of weights and scales; that of the model, where it is wider than float32.
    """

    forget: Samples
    retain: Samples | None
    pad_to_multiple_of: int | None = None
    alternative: bool = False
    dtype: torch.dtype = torch.float32

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pad_token_id = self.forget.pad_token_id
        if "forget_index" not in rows[0]:  # an evaluation batch of plain prepared samples
            return pad_batch(rows, pad_token_id)
        samples = [self.forget[int(row["forget_index"])] for row in rows]
        if self.retain is not None:
            samples += [self.retain[int(row["retain_index"])] for row in rows]
        if self.alternative:
            names = dict(zip(("input_ids", "labels"), ALTERNATIVES, strict=True))
            forget = samples[: len(rows)]
            samples = samples + [{name: sample[column] for name, column in names.items()} for sample in forget]
        batch = pad_batch(samples, pad_token_id)
        if self.pad_to_multiple_of:
            extra = -batch["input_ids"].shape[1] % self.pad_to_multiple_of
            fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX, COUNTED: IGNORE_INDEX}
            for key, value in fill.items():
                if key not in batch:
                    continue
                batch[key] = torch.nn.functional.pad(batch[key], (0, extra), value=value)
        for key in ("row", "forget_index", "retain_index"):
            batch[key] = torch.tensor([int(row[key]) for row in rows])
        for key in ("weight", "retain_scale"):
            batch[key] = torch.tensor([float(row[key]) for row in rows], dtype=self.dtype)
        return batch

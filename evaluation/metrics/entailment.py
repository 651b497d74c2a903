"""Does a true answer follow from what a model says? By a `transformers` model for natural language inference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

LABEL = "entailment"


class Entailment:
    """A sequence-classification model with a label `entailment`; read from its folder without any network.

    Args:
        path: folder, or hub id.
        batch_size: pairs at a time.

    Raises:
        ValueError: for what is no such model.
    """

    def __init__(self, path: str | Path, *, batch_size: int = 32) -> None:
        self.label = entailment_label(path)
        local = Path(path).is_dir()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
            model = AutoModelForSequenceClassification.from_pretrained(
                path, local_files_only=local, use_safetensors=True
            )
        except Exception as error:  # a damaged folder makes the libraries raise nearly anything
            raise ValueError(f"cannot load the entailment model {str(path)!r}: {str(error)[:300]}") from None
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        self.model, self.batch_size = model.to(device).eval(), batch_size

    @torch.no_grad()
    def __call__(self, premises: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
        """Whether each hypothesis follows from its premise: no label is more likely, bool `[N]`."""
        entailed = np.zeros(len(premises), dtype=bool)
        order = sorted(range(len(premises)), key=lambda row: (len(premises[row]) + len(hypotheses[row]), row))
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            texts = ([side[row] for row in rows] for side in (premises, hypotheses))
            batch = self.tokenizer(*texts, padding=True, truncation="longest_first", return_tensors="pt")
            found = self.model(**batch.to(self.model.device)).logits.argmax(-1)
            entailed[rows] = (found == self.label).cpu().numpy()
        return entailed


def entailment_label(path: str | Path) -> int:
    """Number of the label `entailment`; `ValueError` for a model that has none."""
    try:
        names = AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir()).id2label
    except Exception as error:
        raise ValueError(f"cannot load the entailment model {str(path)!r}: {str(error)[:300]}") from None
    found = [int(number) for number, name in names.items() if str(name).strip().lower() == LABEL]
    if len(found) != 1:
        raise ValueError(
            f"the entailment model {str(path)!r} has the labels {sorted(names.values())}, none is {LABEL!r}"
        )
    return found[0]

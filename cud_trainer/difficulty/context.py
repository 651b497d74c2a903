"""What difficulty metrics look at: the original model and the samples, each expensive pass made once and shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..circuits import Graph, attribute_dataset, model_graph
from ..data import BATCH_BYTES, plan_batches
from ..logprobs import evaluation_mode, score_answers
from ..passes import WorkDir, run_batches
from .cud import make_folds

# With the zero baseline one-pass EAP ranks edges as the authors' node-wise interpolation does, for a fraction of its
# cost.
CIRCUIT_DEFAULTS = {"method": "eap", "steps": 5, "baseline": "zero", "metric": "prob"}


def circuit_settings(options: dict[str, Any]) -> dict[str, Any]:
    """All options of the attribution, defaults filled in; `steps` only where it matters."""
    settings = {**CIRCUIT_DEFAULTS, **options}
    if settings["method"] == "eap":
        settings["steps"] = 1
    return settings


@dataclass
class DifficultyContext:
    """Inputs of the metrics. Properties are computed on first use and kept.

    Attributes:
        model: the original model, in evaluation mode.
        forget: prepared forget set, `N` samples.
        retain: prepared retain set, or `None`.
        pad_token_id, batch_size, batch_bytes: for batching, see `cud_trainer.data.plan_batches`.
        seed: of the folds.
        folds: number of cross-fitting folds.
        groups: group of each forget sample (for example its author), never split over folds; or `None`.
        circuit_options: of `cud_trainer.circuits.edge_attributions`.
        calibrate: runs a short unlearning of the forget set and returns its residual memorisation `[N]`.
        work: keeps what is done, for a run that is killed.
        progress: show progress bars.
    """

    model: PreTrainedModel
    forget: Dataset
    retain: Dataset | None
    pad_token_id: int
    batch_size: int | None = None
    batch_bytes: int = BATCH_BYTES
    seed: int = 0
    folds: int = 5
    groups: list[Any] | None = None
    circuit_options: dict[str, Any] = field(default_factory=dict)
    calibrate: Callable[[], np.ndarray] | None = None
    work: WorkDir | None = None
    progress: bool = True

    @cached_property
    def circuit_settings(self) -> dict[str, Any]:
        """All options of the attribution, defaults filled in; `steps` only where it matters."""
        return circuit_settings(self.circuit_options)

    @cached_property
    def _circuits(self) -> tuple[Tensor, Tensor, Tensor, Graph]:
        return attribute_dataset(
            self.model,
            self.forget,
            pad_token_id=self.pad_token_id,
            batch_size=self.batch_size,
            batch_bytes=self.batch_bytes,
            work=self.work,
            progress=self.progress,
            **self.circuit_settings,
        )

    @property
    def edges(self) -> Tensor:
        """Edge scores of every forget sample, float32 `[N, n_edges]`."""
        return self._circuits[0]

    @cached_property
    def graph(self) -> Graph:
        """Of the model, known before any circuit is."""
        return model_graph(self.model, ungroup_kv=self.circuit_settings.get("ungroup_kv", False))

    @cached_property
    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean answer log-probability and number of answer tokens of every forget sample, each `[N]`."""
        if "_circuits" in self.__dict__:  # the attribution pass has scored the answers too
            _, mean_logps, lengths, _ = self._circuits
        else:
            mean_logps, lengths = self._score_answers()
        return mean_logps.double().numpy(), lengths.double().numpy()

    def _score_answers(self) -> tuple[Tensor, Tensor]:
        def compute(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            with torch.no_grad(), evaluation_mode(self.model):
                scores = score_answers(self.model, batch)
            return {"mean_logps": scores.mean_logps.float().cpu(), "lengths": scores.lengths.cpu()}

        lengths = [len(tokens) for tokens in self.forget["input_ids"]]
        config = self.model.config.get_text_config()
        per_token = 8.0 * (config.vocab_size + 8 * config.hidden_size)  # logits, and one layer's activations
        plan = plan_batches(
            lengths, bytes_per_token=per_token, batch_size=self.batch_size, batch_bytes=self.batch_bytes
        )
        device = self.model.get_input_embeddings().weight.device
        found = run_batches(
            "answers",
            self.forget,
            compute,
            plan,
            pad_token_id=self.pad_token_id,
            device=device,
            work=self.work,
            progress=self.progress,
        )
        return found["mean_logps"], found["lengths"]

    @cached_property
    def residual(self) -> np.ndarray:
        """Residual memorisation of every forget sample after the calibration run, `[N]`, higher = harder."""
        if self.calibrate is None:
            raise ValueError("this metric needs a calibration run, which is not available here")
        return np.asarray(self.calibrate(), dtype=np.float64)

    @cached_property
    def fold(self) -> np.ndarray:
        """Cross-fitting fold of every forget sample, int `[N]`."""
        return make_folds(len(self.forget), self.folds, self.seed, self.groups)

"""`score_difficulty`: difficulty scores of a forget set, from a model and data as users have them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..circuits import CircuitTable
from ..data import (
    BATCH_BYTES,
    Samples,
    TemplateContext,
    check_disjoint,
    check_tokenizer,
    check_vocabulary,
    prepare_samples,
)
from ..difficulty import METRICS, AnchorBank, DifficultyContext, DifficultyScores
from ..difficulty.scores import AS_PUBLISHED, PAPER
from ..logprobs import check_padding
from ..models.fingerprint import model_fingerprint, versions
from ..models.positions import check_sets
from ..objectives import UnlearningLoss
from ..resumable import WorkDir, process_state
from .calibration import Calibration, CalibrationSettings, calibrate
from .request import ScoringRequest

logger = logging.get_logger(__name__)

SCORED = ("cud", "loss", "length", "random")  # where no metrics are named: CUD, and what it has to beat


def score_difficulty(
    model: PreTrainedModel,
    dataset: Dataset | Samples,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    metrics: Sequence[str] = SCORED,
    retain_dataset: Dataset | Samples | None = None,
    metric_args: dict[str, dict[str, Any]] | None = None,
    circuit_args: dict[str, Any] | None = None,
    calibration: CalibrationSettings | None = None,
    folds: int = 5,
    group_column: str | None = None,
    batch_size: int | None = None,
    batch_bytes: int = BATCH_BYTES,
    max_length: int | None = 1024,
    counterfactual_column: str | None = None,
    template: TemplateContext | None = None,
    seed: int = 0,
    work_dir: str | Path | None = None,
    save_circuits: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> DifficultyScores:
    """Predict for every sample of a forget set how hard it will be to unlearn, higher = harder.

    Everything is computed on `model` as it is, which is left unchanged. Under `torchrun` or `accelerate launch` the
    processes share the batches; each returns the same table, bit for bit that of one process.

    Args:
        model: the original (memorising) causal LM.
        dataset: forget set, in any format of `cud_trainer.data.prepare_dataset`, or `Samples`, which are taken as they
            are: `max_length` and `counterfactual_column` are for what is not prepared yet.
        processing_class: tokenizer with pad and eos tokens; `Samples` need none.
        metrics: names in `cud_trainer.difficulty.METRICS`; the first is the primary one.
        retain_dataset: used by the calibration run's retain term; without it the objective runs alone.
        metric_args: options by metric, for example `{"cud": {"variant": "top_k", "k": 100}}`.
        circuit_args: options of `cud_trainer.circuits.edge_attributions`.
        calibration: how anchors are calibrated; by default NPO, AdamW from 1e-5 upwards.
        folds: cross-fitting folds.
        group_column: column of `dataset` whose groups are never split over folds.
        batch_size: samples per forward pass at most; by default only `batch_bytes` bounds a batch.
        batch_bytes: estimated memory of a batch at most. A batch that does not fit after all is halved.
        counterfactual_column: another answer for circuits with the counterfactual baseline, see `prepare_dataset`.
        template: what a chat template sees beside the messages, see `prepare_dataset`.
        work_dir: directory that keeps finished batches and the calibration run: the same call goes on there after it
            was killed. Holds edge scores and ids, no text; remove it when it is no longer needed.
        save_circuits: write the edge scores of all samples to this file (`cud_trainer.circuits.CircuitTable`).
        overwrite: replace `save_circuits` if it is there.

    Returns:
        `DifficultyScores` in dataset order.

    Raises:
        ValueError: for bad input, naming the sample, metric or option, before anything is computed.
    """
    if processing_class is None and not (isinstance(dataset, Samples) and isinstance(retain_dataset, Samples | None)):
        raise ValueError("score_difficulty needs the tokenizer: pass processing_class")
    if processing_class is not None:
        check_tokenizer(processing_class)
        check_vocabulary(processing_class, model)
    request = ScoringRequest(
        metrics=metrics,
        metric_args=metric_args or {},
        circuit_args=circuit_args or {},
        calibration=calibration or CalibrationSettings(batch_size=batch_size or 8, seed=seed),
        folds=folds,
        group_column=group_column,
        batch_size=batch_size,
        batch_bytes=batch_bytes,
        seed=seed,
        work_dir=work_dir,
        save_circuits=save_circuits,
        overwrite=overwrite,
        progress=progress,
    )
    request.check(model)
    options = {"max_length": max_length, "template": template or TemplateContext()}
    forget, retain = _samples(request, dataset, retain_dataset, processing_class, counterfactual_column, options)
    _check_read(model, forget, retain)
    return _Scoring(model, forget, retain, request).run()


def _check_read(model: PreTrainedModel, forget: Samples, retain: Samples | None) -> None:
    """Raise `ValueError` for samples that the model cannot read as they are."""
    check_sets(model, forget=forget, retain=retain)
    check_padding(model, "forget", forget)


def _samples(
    request: ScoringRequest,
    dataset: Dataset | Samples,
    retain_dataset: Dataset | Samples | None,
    tokenizer: Any,
    counterfactual_column: str | None,
    options: dict[str, Any],
) -> tuple[Samples, Samples | None]:
    """Forget and retain samples, fit for what is asked."""
    forget = prepare_samples(
        dataset,
        tokenizer,
        name="forget",
        keep_columns=[request.group_column] if request.group_column else [],
        counterfactual_column=counterfactual_column,
        **options,
    )
    request.check_forget(forget)
    retain = None
    if retain_dataset is not None:
        retain = prepare_samples(retain_dataset, tokenizer, name="retain", **options)
        check_disjoint(forget, retain)
    request.check_folds(forget)
    return forget, retain


@dataclass
class _Scoring:
    """One request, carried out."""

    model: PreTrainedModel
    forget: Samples
    retain: Samples | None
    request: ScoringRequest
    calibrations: dict[str, Calibration] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.settings = request.calibration.for_data(self.retain)
        self.identity = {
            "model": model_fingerprint(self.model),
            "dataset": self.forget.fingerprint,
            "versions": versions(),
        }
        if self.forget.template is not None:
            self.identity["template"] = self.forget.template
        self.begun = request.begun
        self.work = self._work_dir()
        self.context = DifficultyContext(
            model=self.model,
            forget=self.forget,
            retain=self.retain,
            batch_size=request.batch_size,
            batch_bytes=request.batch_bytes,
            seed=request.seed,
            folds=request.folds,
            groups=request.groups(self.forget),
            circuit_options=request.circuit_args,
            calibrate=self._calibrate,
            metrics=tuple(request.metrics),
            work=self.work,
            progress=request.progress,
        )

    def _work_dir(self) -> WorkDir | None:
        """Where finished parts are kept, if anywhere: only for the very same call."""
        request = self.request
        if request.work_dir is None:
            return None
        return WorkDir(
            request.work_dir,
            {
                **self.identity,
                "circuits": request.circuits,
                "batches": {"batch_size": request.batch_size, "batch_bytes": request.batch_bytes},
                "seed": request.seed,  # that of weight noise, and of the retain samples in a mean gradient
                "retain": None if self.retain is None else self.retain.fingerprint,
                "calibration": self.settings.identity(),
            },
        )

    def run(self) -> DifficultyScores:
        """The scores, every metric computed."""
        with nullcontext() if self.work is None else self.work.kept_unless_refused():
            return self._computed()

    def _computed(self) -> DifficultyScores:
        request, metrics = self.request, self.request.metrics
        for name in metrics:
            METRICS[name].check_data(self.context)
        # Metrics that share the attribution pass go first, so that its by-products are there for the others.
        by_cost = sorted(metrics, key=lambda name: not METRICS[name].reads_circuits(request.metric_args.get(name, {})))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)  # the initial adapter of a calibration run
            computed = {
                name: METRICS[name].compute(self.context, **request.metric_args.get(name, {})) for name in by_cost
            }
        if request.save_circuits is not None and process_state().is_main_process:
            self._save_circuits(request.save_circuits)
        columns = {name: computed[name] for name in metrics}
        fold = self.context.fold if request.cross_fitted or self.context.folded else None
        scores = DifficultyScores(list(self.forget.ids), columns, fold, self._provenance())
        for name in scores.constant:
            logger.warning(f"difficulty metric {name!r} is the same for all {len(scores)} samples: it ranks nothing")
        return scores

    def _calibrate(self, objective: str | None) -> np.ndarray:
        """Residual memorisation after a calibration run, with another objective than the user's if one is named."""
        settings, name = self.settings, "calibration"
        if objective is not None:
            settings = replace(settings, loss=UnlearningLoss(objective)).for_data(self.retain)
            name = f"calibration-{objective}"
        # Every process runs it: none has to wait for longer than a collective call may take.
        saved = self.work.load(name) if self.work is not None else None
        if saved is not None:
            calibration = Calibration.from_tensors(saved)
        else:
            calibration = calibrate(self.model, self.forget, self.retain, settings, progress=self.request.progress)
        shared = [calibration]
        if process_state().num_processes > 1:  # rounding may differ between devices
            broadcast_object_list(shared)
        self.calibrations[settings.loss.objective] = shared[0]
        if self.work is not None and saved is None and process_state().is_main_process:
            self.work.save(name, shared[0].tensors())
        return shared[0].residual

    def _save_circuits(self, path: str | Path) -> None:
        table = CircuitTable(list(self.forget.ids), self.context.edges, self.context.graph, self.request.circuits)
        if not (self.begun and table.saved_at(path)):
            table.save(path, overwrite=self.request.overwrite)

    def _provenance(self) -> dict[str, Any]:
        """What the scores were made with."""
        request, settings = self.request, self.settings
        provenance = {
            **({PAPER: AS_PUBLISHED} if PAPER in request.metrics else {}),
            **self.identity,
            "metric_args": _recorded(request.metric_args),
            "circuits": request.circuits,
            "seed": request.seed,
        }
        if self.calibrations:
            provenance["calibration"] = {
                "objective": settings.loss.objective,
                "retain_loss": settings.loss.retain_loss,
                "retain_weight": settings.retain_weight,
                "learning_rate": settings.learning_rate,
                "adapter": settings.peft_config is not None,
                "runs": {
                    name: {"pairs": run.pairs, "forget_probability": run.snapshots}
                    for name, run in sorted(self.calibrations.items())
                },
            }
        return provenance


def _recorded(metric_args: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options of metrics as plain values: an anchor bank by what it holds."""
    return {
        name: {
            option: f"anchor bank {value.fingerprint}" if isinstance(value, AnchorBank) else value
            for option, value in options.items()
        }
        for name, options in metric_args.items()
    }

"""`score_difficulty`: difficulty scores of a forget set, from a model and data as users have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..circuits import CircuitTable, check_architecture
from ..circuits.attribution import check_options, needs_counterfactual
from ..data import (
    BATCH_BYTES,
    COUNTERFACTUAL,
    check_disjoint,
    check_tokenizer,
    dataset_fingerprint,
    prepare_dataset,
)
from ..difficulty import METRICS, DifficultyContext, DifficultyScores
from ..difficulty.context import CIRCUIT_DEFAULTS, circuit_settings
from ..difficulty.folds import make_folds
from ..files import check_new_file
from ..models.fingerprint import model_fingerprint, versions
from ..objectives import UnlearningLoss
from ..resumable import WorkDir, process_state
from .calibration import Calibration, CalibrationSettings, calibrate

logger = logging.get_logger(__name__)


def check_metrics(metrics: Sequence[str], options: dict[str, dict[str, Any]], model_or_config: Any = None) -> None:
    """Raise `ValueError` for an unknown metric or option, or circuits on an architecture without them."""
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, got {metrics!r}")
    if not metrics:
        raise ValueError(f"no difficulty metric given; choose from {sorted(METRICS)}")
    for name in [*metrics, *options]:
        METRICS.find(name)
    for name in dict.fromkeys([*options, *metrics]):
        given = options.get(name, {})
        METRICS[name].check_options(given)
        for objective in given.get("methods", ()):
            UnlearningLoss(objective)  # refuses an unknown one
    if model_or_config is not None and any(METRICS[name].needs_circuits for name in metrics):
        check_architecture(model_or_config)


def score_difficulty(
    model: PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    metrics: Sequence[str] = ("cud", "circuit_mass", "loss", "length"),
    retain_dataset: Dataset | None = None,
    metric_args: dict[str, dict[str, Any]] | None = None,
    circuit_args: dict[str, Any] | None = None,
    calibration: CalibrationSettings | None = None,
    folds: int = 5,
    group_column: str | None = None,
    batch_size: int | None = None,
    batch_bytes: int = BATCH_BYTES,
    max_length: int | None = 1024,
    counterfactual_column: str | None = None,
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
        dataset: forget set, in any format of `cud_trainer.data.prepare_dataset`, or prepared.
        processing_class: tokenizer with pad and eos tokens.
        metrics: names in `cud_trainer.difficulty.METRICS`; the first is the primary one.
        retain_dataset: used by the calibration run's retain term; without it the objective runs alone.
        metric_args: options by metric, for example `{"cud": {"variant": "paper", "k": 100}}`.
        circuit_args: options of `cud_trainer.circuits.edge_attributions`.
        calibration: how anchors are calibrated; by default NPO, AdamW from 1e-5 upwards.
        folds: cross-fitting folds.
        group_column: column of `dataset` whose groups are never split over folds.
        batch_size: samples per forward pass at most; by default only `batch_bytes` bounds a batch.
        batch_bytes: estimated memory of a batch at most. A batch that does not fit after all is halved.
        counterfactual_column: another answer for circuits with the counterfactual baseline, see `prepare_dataset`.
        work_dir: directory that keeps finished batches and the calibration run: the same call goes on there after it
            was killed. Holds edge scores and ids, no text; remove it when it is no longer needed.
        save_circuits: write the edge scores of all samples to this file (`cud_trainer.circuits.CircuitTable`).
        overwrite: replace `save_circuits` if it is there.

    Returns:
        `DifficultyScores` in dataset order.

    Raises:
        ValueError: for bad input, naming the sample, metric or option, before anything is computed.
    """
    if processing_class is None:
        raise ValueError("score_difficulty needs the tokenizer: pass processing_class")
    check_tokenizer(processing_class)
    metric_args, circuit_args = metric_args or {}, circuit_args or {}
    check_metrics(metrics, metric_args, model)
    for name, value in (("batch_size", 1 if batch_size is None else batch_size), ("batch_bytes", batch_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    # A call that goes on in its work directory may have written its circuits before it was killed.
    begun = work_dir is not None and WorkDir.begun(work_dir)
    if save_circuits is not None:
        if not begun:
            check_new_file(save_circuits, overwrite)
        if not any(METRICS[name].needs_circuits for name in metrics):
            raise ValueError(f"save_circuits has nothing to save: none of the metrics {list(metrics)} needs circuits")
    unknown = [option for option in circuit_args if option not in (*CIRCUIT_DEFAULTS, "ungroup_kv", "reference_quirk")]
    if unknown:
        raise ValueError(f"unknown circuit option {unknown[0]!r}; choose from {sorted(CIRCUIT_DEFAULTS)}")
    options = {**CIRCUIT_DEFAULTS, **circuit_args}
    check_options(options["method"], options["steps"], options["baseline"], options["metric"])
    groups = [group_column] if group_column else []
    forget = prepare_dataset(
        dataset,
        processing_class,
        max_length=max_length,
        name="forget",
        keep_columns=groups,
        counterfactual_column=counterfactual_column,
    )
    if needs_counterfactual(options["baseline"], options["metric"]) and COUNTERFACTUAL not in forget.column_names:
        raise ValueError(
            "circuits with the counterfactual baseline or logit_diff need another answer for each sample: "
            "give counterfactual_column"
        )
    retain = None
    if retain_dataset is not None:
        retain = prepare_dataset(retain_dataset, processing_class, max_length=max_length, name="retain")
        check_disjoint(forget, retain)
    settings = calibration or CalibrationSettings(batch_size=batch_size or 8, seed=seed)
    settings = settings.for_data(retain)
    group_values = list(forget[group_column]) if group_column else None
    cross_fitted = any(METRICS[name].cross_fitted for name in metrics)
    if cross_fitted:
        make_folds(len(forget), folds, seed, group_values)  # refuses before any compute

    pad_token_id = int(processing_class.pad_token_id)  # type: ignore[arg-type]
    identity = {"model": model_fingerprint(model), "dataset": dataset_fingerprint(forget), "versions": versions()}
    circuits = circuit_settings(circuit_args)
    work = None
    if work_dir is not None:
        bounds = {"batch_size": batch_size, "batch_bytes": batch_bytes}
        run = {"retain": None if retain is None else dataset_fingerprint(retain), "calibration": settings.identity()}
        # the seed is that of weight noise, and of the retain samples in a mean gradient
        work = WorkDir(work_dir, {**identity, "circuits": circuits, "batches": bounds, "seed": seed, **run})
    runs: dict[str, Calibration] = {}

    def run_calibration(objective: str | None) -> np.ndarray:
        run, name = settings, "calibration"
        if objective is not None:
            run, name = replace(settings, loss=UnlearningLoss(objective)).for_data(retain), f"calibration-{objective}"
        # Every process runs it: none has to wait for longer than a collective call may take.
        kept = work.load(name) if work is not None else None
        found = (
            Calibration.from_tensors(kept)
            if kept is not None
            else calibrate(model, forget, retain, run, pad_token_id=pad_token_id, progress=progress)
        )
        shared = [found]
        if process_state().num_processes > 1:  # rounding may differ between devices
            broadcast_object_list(shared)
        runs[run.loss.objective] = shared[0]
        if work is not None and kept is None and process_state().is_main_process:
            work.save(name, shared[0].tensors())
        return shared[0].residual

    context = DifficultyContext(
        model=model,
        forget=forget,
        retain=retain,
        pad_token_id=pad_token_id,
        batch_size=batch_size,
        batch_bytes=batch_bytes,
        seed=seed,
        folds=folds,
        groups=group_values,
        circuit_options=circuit_args,
        calibrate=run_calibration,
        metrics=tuple(metrics),
        work=work,
        progress=progress,
    )
    for name in metrics:
        METRICS[name].check_data(context)
    # Metrics that share the attribution pass go first, so that its by-products are there for the others.
    by_cost = sorted(metrics, key=lambda name: not METRICS[name].needs_circuits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the initial adapter of a calibration run
        computed = {name: METRICS[name].compute(context, **metric_args.get(name, {})) for name in by_cost}
    if save_circuits is not None and process_state().is_main_process:
        table = CircuitTable(list(forget["sample_id"]), context.edges, context.graph, circuits)
        if not (begun and table.saved_at(save_circuits)):
            table.save(save_circuits, overwrite=overwrite)
    provenance = {**identity, "metric_args": metric_args, "circuits": circuits, "seed": seed}
    if runs:
        provenance["calibration"] = {
            "objective": settings.loss.objective,
            "retain_loss": settings.loss.retain_loss,
            "retain_weight": settings.retain_weight,
            "learning_rate": settings.learning_rate,
            "adapter": settings.peft_config is not None,
            "runs": {
                name: {"pairs": run.pairs, "forget_probability": run.snapshots} for name, run in sorted(runs.items())
            },
        }
    scores = DifficultyScores(
        list(forget["sample_id"]),
        {name: computed[name] for name in metrics},
        context.fold if cross_fitted else None,
        provenance,
    )
    for name in scores.constant:
        logger.warning(f"difficulty metric {name!r} is the same for all {len(scores)} samples: it ranks nothing")
    return scores

"""`score_difficulty`: difficulty scores of a forget set, from a model and data as users have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration import CalibrationSettings, calibrate
from .circuits import check_architecture
from .circuits.attribution import check_options
from .data import check_disjoint, check_tokenizer, dataset_fingerprint, prepare_dataset
from .difficulty import METRICS, DifficultyContext, DifficultyScores
from .difficulty.context import CIRCUIT_DEFAULTS
from .difficulty.cud import make_folds
from .fingerprint import model_fingerprint, versions


def check_metrics(metrics: Sequence[str], options: dict[str, dict[str, Any]], model_or_config: Any = None) -> None:
    """Raise `ValueError` for an unknown metric or option, or circuits on an architecture without them."""
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, got {metrics!r}")
    if not metrics:
        raise ValueError(f"no difficulty metric given; choose from {sorted(METRICS)}")
    for name in [*metrics, *options]:
        if name not in METRICS:
            raise ValueError(f"unknown difficulty metric {name!r}; choose one of {sorted(METRICS)}")
    for name, given in options.items():
        METRICS[name].check_options(given)
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
    batch_size: int = 8,
    max_length: int | None = 1024,
    seed: int = 0,
    progress: bool = True,
) -> DifficultyScores:
    """Predict for every sample of a forget set how hard it will be to unlearn, higher = harder.

    Everything is computed on `model` as it is, which is left unchanged.

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
        batch_size: samples per forward pass.

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
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    unknown = [option for option in circuit_args if option not in (*CIRCUIT_DEFAULTS, "ungroup_kv")]
    if unknown:
        raise ValueError(f"unknown circuit option {unknown[0]!r}; choose from {sorted(CIRCUIT_DEFAULTS)}")
    options = {**CIRCUIT_DEFAULTS, **circuit_args}
    check_options(options["method"], options["steps"], options["baseline"], options["metric"])
    groups = [group_column] if group_column else []
    forget = prepare_dataset(dataset, processing_class, max_length=max_length, name="forget", keep_columns=groups)
    retain = None
    if retain_dataset is not None:
        retain = prepare_dataset(retain_dataset, processing_class, max_length=max_length, name="retain")
        check_disjoint(forget, retain)
    settings = calibration or CalibrationSettings(batch_size=batch_size, seed=seed)
    if retain is None and settings.loss.retain_loss != "none":
        settings = replace(settings, loss=settings.loss.without_retain())
    group_values = list(forget[group_column]) if group_column else None
    cross_fitted = any(METRICS[name].needs_circuits and name.startswith("cud") for name in metrics)
    if cross_fitted:
        make_folds(len(forget), folds, seed, group_values)  # refuses before any compute

    runs: list[Any] = []

    def run_calibration():
        runs.append(calibrate(model, forget, retain, settings, pad_token_id=pad_token_id, progress=progress))
        return runs[-1].residual

    pad_token_id = int(processing_class.pad_token_id)  # type: ignore[arg-type]
    context = DifficultyContext(
        model=model,
        forget=forget,
        retain=retain,
        pad_token_id=pad_token_id,
        batch_size=batch_size,
        seed=seed,
        folds=folds,
        groups=group_values,
        circuit_options=circuit_args,
        calibrate=run_calibration,
        progress=progress,
    )
    # Metrics that share the attribution pass go first, so that its by-products are there for the others.
    by_cost = sorted(metrics, key=lambda name: not METRICS[name].needs_circuits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the initial adapter of a calibration run
        computed = {name: METRICS[name].compute(context, **metric_args.get(name, {})) for name in by_cost}
    provenance = {
        "model": model_fingerprint(model),
        "dataset": dataset_fingerprint(forget),
        "metric_args": metric_args,
        "circuits": context.circuit_settings,
        "seed": seed,
        "versions": versions(),
    }
    if runs:
        provenance["calibration"] = {
            "objective": settings.loss.objective,
            "retain_loss": settings.loss.retain_loss,
            "retain_weight": settings.retain_weight,
            "learning_rate": settings.learning_rate,
            "adapter": settings.peft_config is not None,
            "pairs": runs[-1].pairs,
            "forget_probability": runs[-1].snapshots,
        }
    return DifficultyScores(
        list(forget["sample_id"]),
        {name: computed[name] for name in metrics},
        context.fold if cross_fitted else None,
        provenance,
    )

"""What is asked of `score_difficulty`: its options, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..circuits import check_architecture
from ..circuits.attribution import check_options, needs_counterfactual
from ..circuits.relevance import check_relevance
from ..data import Samples
from ..difficulty import METRICS
from ..difficulty.context import CIRCUIT_DEFAULTS, circuit_settings
from ..difficulty.folds import make_folds
from ..files import check_new_file
from ..models.shards import check_unpartitioned
from ..models.whole import check_finite
from ..objectives import UnlearningLoss
from ..resumable import WorkDir
from ..typed import check_numbers_within
from ..typed import check_options as check_fields
from .calibration import CalibrationSettings


def check_metrics(metrics: Sequence[str], options: dict[str, dict[str, Any]], model_or_config: Any = None) -> None:
    """Raise `ValueError` for an unknown metric or option, or circuits on an architecture without them."""
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, got {metrics!r}")
    if not metrics:
        raise ValueError(f"no difficulty metric given; choose from {sorted(METRICS)}")
    for name in [*metrics, *options]:
        METRICS.find(name)
    for name in dict.fromkeys([*options, *metrics]):
        metric_options = options.get(name, {})
        METRICS[name].check_options(metric_options)
        for objective in metric_options.get("methods", ()):
            UnlearningLoss(objective)  # refuses an unknown one
    circuits = [name for name in metrics if METRICS[name].reads_circuits(options.get(name, {}))]
    if model_or_config is not None and circuits:
        check_circuits(f"difficulty metric {circuits[0]!r}", model_or_config)


def check_circuits(what: str, model_or_config: Any) -> None:
    """Raise `ValueError` where an architecture has no circuits, which `what` needs."""
    try:
        check_architecture(model_or_config)
    except ValueError as error:
        without = [name for name, metric in METRICS.items() if not metric.reads_circuits({})]
        raise ValueError(f"{what} needs circuits, and {error}. Metrics that need none: {', '.join(without)}") from None


@dataclass(frozen=True)
class ScoringRequest:
    """The options of `score_difficulty` that say what to compute and where to keep it; see there."""

    metrics: Sequence[str]
    metric_args: dict[str, dict[str, Any]]
    circuit_args: dict[str, Any]
    calibration: CalibrationSettings
    folds: int
    group_column: str | None
    batch_size: int | None
    batch_bytes: int
    seed: int
    work_dir: str | Path | None
    save_circuits: str | Path | None
    overwrite: bool
    progress: bool

    @property
    def circuits(self) -> dict[str, Any]:
        """All options of the attribution, defaults filled in."""
        return circuit_settings(self.circuit_args)

    @property
    def cross_fitted(self) -> bool:
        """Whether a sample's score depends on folds of the others."""
        return any(METRICS[name].uses_folds(self.metric_args.get(name, {})) for name in self.metrics)

    @property
    def reads_circuits(self) -> bool:
        """Whether edge scores are computed: a metric reads them, or they are to be saved."""
        by_metric = any(METRICS[name].reads_circuits(self.metric_args.get(name, {})) for name in self.metrics)
        return by_metric or self.save_circuits is not None

    @property
    def begun(self) -> bool:
        """Whether the same call was started before, in its work directory."""
        return self.work_dir is not None and WorkDir.begun(self.work_dir)

    def groups(self, forget: Samples) -> list[Any] | None:
        """The group of each forget sample."""
        return list(forget[self.group_column]) if self.group_column else None

    def check(self, model: Any) -> None:
        """Raise `ValueError` naming a metric, option or file that cannot be, whatever the data."""
        check_fields(self, strict=False)
        check_numbers_within("circuit_args", self.circuit_args)
        check_metrics(self.metrics, self.metric_args, model)
        check_unpartitioned(model)
        check_finite(getattr(model, "name_or_path", None) or type(model).__name__, model)
        if self.save_circuits is not None:
            if self.work_dir is not None and _within(self.save_circuits, self.work_dir):
                raise ValueError(f"save_circuits {self.save_circuits} lies in work_dir, which is removed at the end")
            if not self.begun:  # a call that goes on may have written its circuits before it was killed
                check_new_file(self.save_circuits, self.overwrite)
            check_circuits("save_circuits", model)
        all_options = (*CIRCUIT_DEFAULTS, "ungroup_kv", "reference_quirk")
        unknown = [option for option in self.circuit_args if option not in all_options]
        if unknown:
            raise ValueError(f"unknown circuit option {unknown[0]!r}; choose from {sorted(CIRCUIT_DEFAULTS)}")
        options = {**CIRCUIT_DEFAULTS, **self.circuit_args}
        check_options(options["method"], options["steps"], options["baseline"], options["metric"])
        if options["method"] == "relp" and self.reads_circuits:
            check_relevance(model)

    def check_forget(self, forget: Samples) -> None:
        """Raise `ValueError` naming what the forget samples lack."""
        if self.group_column and self.group_column not in forget.dataset.column_names:
            raise ValueError(
                f"forget dataset has no column {self.group_column!r}; it has {sorted(forget.dataset.column_names)}"
            )
        if needs_counterfactual(self.circuits["baseline"], self.circuits["metric"]) and not forget.has_counterfactuals:
            raise ValueError(
                "circuits with the counterfactual baseline or logit_diff need another answer for each sample: "
                "give counterfactual_column"
            )

    def check_folds(self, forget: Samples) -> None:
        """Raise `ValueError` when so many samples and groups do not make so many folds."""
        if self.cross_fitted:
            make_folds(len(forget), self.folds, self.seed, self.groups(forget))


def _within(path: str | Path, folder: str | Path) -> bool:
    return Path(folder).expanduser().resolve() in Path(path).expanduser().resolve().parents

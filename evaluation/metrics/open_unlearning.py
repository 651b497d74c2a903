"""What open-unlearning has measured, read from its result files; needs no model.

Its `TOFU_EVAL.json` is `{metric: {"agg_value": number, "value_by_index": {"0": {...}, ...}}}`. What has the same
definition here is read under the name it has here; the rest is listed with its value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from cud_trainer.data import detect_format, question_and_answer

from .measure import Measured
from .utility import closer_to_one, true_better

# Ours -> (their metric in lower case, the value of a sample). Lists (one value per answer) are averaged.
FORGET = {
    "probability": ("forget_q_a_prob", "prob"),
    "exact_memorization": ("exact_memorization", "score"),
    "extraction_strength": ("extraction_strength", "score"),
    "rouge_l_recall": ("forget_q_a_rouge", "rougeL_recall"),
}
RETAIN = {"probability": ("retain_q_a_prob", "prob"), "rouge_l_recall": ("retain_q_a_rouge", "rougeL_recall")}
TRUTH_RATIO = ("forget_truth_ratio", "score")
LOSSES = "mia_loss"  # has two sets: the mean answer loss of each forget sample, and of each sample that nobody saw
SAME = 0.02  # of probability: their metrics are computed in bfloat16, in batches of their own
UTILITY = {
    "retain/probability": ("retain_q_a_prob", "prob"),
    "retain/rouge_l_recall": ("retain_q_a_rouge", "rougeL_recall"),
    "retain/truth_ratio": ("retain_truth_ratio", "score"),
    "real_authors/probability": ("ra_q_a_prob_normalised", "prob"),
    "real_authors/rouge_l_recall": ("ra_q_a_rouge", "rougeL_recall"),
    "real_authors/truth_ratio": ("ra_truth_ratio", "score"),
    "world_facts/probability": ("wf_q_a_prob_normalised", "prob"),
    "world_facts/rouge_l_recall": ("wf_q_a_rouge", "rougeL_recall"),
    "world_facts/truth_ratio": ("wf_truth_ratio", "score"),
}


@dataclass
class Evaluation:
    """One `*_EVAL.json`.

    Attributes:
        path: for errors.
        metrics: their results by metric, names in lower case.
        names: the metrics as they are written.
        used, skipped: what was read, and why something was not, by metric.
    """

    path: str
    metrics: dict[str, Mapping[str, Any]]
    names: dict[str, str]
    used: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str) -> Evaluation:
        """Read a file; `ValueError` naming it if it is none of these."""
        try:
            metrics = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        if not isinstance(metrics, dict) or not all(isinstance(value, dict) for value in metrics.values()):
            raise ValueError(f"{path} is no evaluation of open-unlearning: it must map metrics to results")
        if not any("value_by_index" in value for value in metrics.values()):
            raise ValueError(f"{path} has no values by sample: give the EVAL.json, not the SUMMARY.json")
        for name, value in list(metrics.items()):
            if name.lower() == LOSSES:
                metrics |= {f"{name}/{part}": found for part, found in value.items() if isinstance(found, dict)}
        values = {name.lower(): value for name, value in metrics.items()}
        return cls(path, values, {name.lower(): name for name in metrics})

    def samples(self, metric: str) -> list[Mapping[str, Any]] | None:
        """Values of each sample in the order of its index, `None` without that metric.

        Raises:
            ValueError: for indices that are not 0 to N - 1.
        """
        values = self.metrics.get(metric, {}).get("value_by_index")
        if values is None:
            return None
        name = self.names[metric]
        if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
            raise ValueError(f"{self.path}: {name} has no values by sample")
        missing = [index for index in range(len(values)) if str(index) not in values]
        if missing or not values:
            raise ValueError(
                f"{self.path}: {name} has {len(values)} samples, but no index {missing[0] if missing else 0}"
            )
        return [values[str(index)] for index in range(len(values))]

    def column(self, metric: str, key: str) -> np.ndarray | None:
        """`[N]` numbers, `None` without that metric, or (then `skipped` says so) where a sample has no number.

        Raises:
            ValueError: for a sample without `key`, or with something else than numbers.
        """
        samples = self.samples(metric)
        if samples is None:
            return None
        values = np.empty(len(samples))
        for index, sample in enumerate(samples):
            if key not in sample:
                raise ValueError(f"{self.path}: sample {index} of {self.names[metric]} has no {key!r}")
            numbers = sample[key] if isinstance(sample[key], list) else [sample[key]]
            if not all(n is None or (isinstance(n, (int, float)) and not isinstance(n, bool)) for n in numbers):
                raise ValueError(f"{self.path}: {key} of sample {index} of {self.names[metric]} is no number")
            values[index] = np.mean([np.nan if n is None else n for n in numbers]) if numbers else np.nan
        undefined = int((~np.isfinite(values)).sum())
        if undefined:
            self.skipped[metric] = f"undefined for {undefined} of {len(values)} samples"
            return None
        self.used.add(metric)
        return values

    def ratio(self, metric: str, key: str, aggregate: Any) -> np.ndarray | None:
        """Truth ratios, wrong to right, `[N]`; not those of another definition, which another aggregate tells."""
        values = self.column(metric, key)
        theirs = self.metrics.get(metric, {}).get("agg_value")
        if values is None:
            return None
        if theirs is not None and np.isclose(aggregate(values).mean(), theirs, rtol=1e-3, atol=1e-4):
            return values
        self.used.discard(metric)
        self.skipped[metric] = "another definition (aggregator) than TOFU's"
        return None

    def measured(self, rows: np.ndarray | None) -> Measured:
        """What our report is made of.

        Args:
            rows: their index of each forget sample, `[N]`; `None`: the same order.

        Raises:
            ValueError: without forget probabilities, or with another number of samples in a metric of the forget set.
        """
        forget = {ours: self.column(*theirs) for ours, theirs in FORGET.items()}
        ratios = self.ratio(*TRUTH_RATIO, closer_to_one)
        if forget["probability"] is None:
            why = self.skipped.get(FORGET["probability"][0], f"it has {', '.join(sorted(self.names.values()))}")
            raise ValueError(f"{self.path} has no forget_Q_A_Prob of every sample ({why})")
        size = len(forget["probability"])
        for (metric, _), values in zip([*FORGET.values(), TRUTH_RATIO], [*forget.values(), ratios], strict=True):
            if values is not None and len(values) != size:
                raise ValueError(f"{self.path}: {self.names[metric]} has {len(values)} samples, forget_Q_A_Prob {size}")
        order = np.arange(size) if rows is None else rows
        sets = {"forget": {name: values[order] for name, values in forget.items() if values is not None}}
        retain = {ours: self.column(*theirs) for ours, theirs in RETAIN.items()}
        if retain["probability"] is not None:
            sets["retain"] = {name: values for name, values in retain.items() if values is not None}
        utility = {}
        for ours, (metric, key) in UTILITY.items():
            if ours.endswith("truth_ratio"):
                values = self.ratio(metric, key, true_better)
                values = None if values is None else true_better(values)
            else:
                values = self.column(metric, key)
            if values is not None:
                utility[ours] = values
        ratios = None if ratios is None else ratios[order]
        return Measured(sets, statistics={"forget": {}}, truth_ratio=ratios, utility=utility)

    def never_seen(self) -> np.ndarray | None:
        """Answer probability of the samples that nobody saw, `[M]`, from `mia_loss`; `None` without that metric, or
        (then `skipped` says so) where its forget set is not the one that `forget_Q_A_Prob` was measured on."""
        losses = {part: self.column(f"{LOSSES}/{part}", "score") for part in ("forget", "holdout")}
        left = self.column(*FORGET["probability"])
        for part in losses:
            if f"{LOSSES}/{part}" in self.skipped:
                self.skipped[LOSSES] = self.skipped[f"{LOSSES}/{part}"]
        forget, holdout = losses["forget"], losses["holdout"]
        if forget is None or holdout is None or left is None:
            return None
        if len(forget) != len(left) or not np.allclose(np.exp(-forget), left, rtol=0, atol=SAME):
            self.skipped[LOSSES] = "its forget set gets other probabilities than forget_Q_A_Prob has"
            return None
        return np.exp(-holdout)

    def others(self) -> list[tuple[str, float | None, str]]:
        """Metrics that `measured` did not use: the name, its single value, if it has one, and why it was not used."""
        others = []
        for name, result in self.metrics.items():
            if name in self.used or name.startswith(f"{LOSSES}/"):
                continue
            value, single = result.get("agg_value"), None
            if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value):
                single = float(value)
            others.append((self.names[name], single, self.skipped.get(name, "no section of its own")))
        return others


def rows_by_text(evaluation: Evaluation, dataset: Dataset) -> np.ndarray:
    """Their index of each sample of `dataset`, `[N]`, by the true answers that their ROUGE results hold.

    White space does not count. Of samples with the same answer the one at the same position is taken.

    Raises:
        ValueError: naming the index (not the text) of a sample that is not there, or cannot be told from others.
    """
    samples = evaluation.samples("forget_q_a_rouge")
    if samples is None or any(not isinstance(sample.get("ground_truth"), str) for sample in samples):
        raise ValueError(f"{evaluation.path} holds no texts to join by: leave forget_dataset out")
    kind = detect_format(dataset.column_names, "forget")
    if kind in ("tokenised", "text"):
        raise ValueError(f"samples cannot be joined by their answers: the forget dataset is of the kind {kind!r}")
    if len(samples) != len(dataset):
        raise ValueError(f"{evaluation.path} has {len(samples)} forget samples, the forget dataset {len(dataset)}")

    def bare(text: str) -> str:
        return "".join(text.split())

    places: dict[str, dict[int, None]] = {}
    for row, sample in enumerate(dataset):
        places.setdefault(bare(question_and_answer(sample, kind)[1]), {})[row] = None
    rows = np.full(len(dataset), -1)
    for index, sample in enumerate(samples):
        candidates = places.get(bare(sample["ground_truth"]), {})
        if index not in candidates and len(candidates) != 1:
            what = "is not in" if not candidates else "is more than once in"
            raise ValueError(f"{evaluation.path}: the answer of sample {index} {what} the forget dataset")
        rows[index if index in candidates else next(iter(candidates))] = index
    if (rows < 0).any():
        raise ValueError(f"{evaluation.path} has no result for row {int(np.argmin(rows))} of the forget dataset")
    return rows

"""`cud import`: the report by difficulty from evaluations that open-unlearning has made; needs no model.

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
import pandas as pd
from datasets import Dataset

from cud_trainer.commands.parser import parse_options
from cud_trainer.data import detect_format, id_column, question_and_answer
from cud_trainer.data.sources import load_samples
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.files import check_output_dir
from cud_trainer.models.fingerprint import versions

from ..metrics import measure as harness
from ..metrics.utility import closer_to_one, true_better
from ..report import tables as sections
from .evaluate import audit_results

# Ours -> (their metric in lower case, the value of a sample). Lists (one value per answer) are averaged.
FORGET = {
    "probability": ("forget_q_a_prob", "prob"),
    "exact_memorization": ("exact_memorization", "score"),
    "extraction_strength": ("extraction_strength", "score"),
    "rouge_l_recall": ("forget_q_a_rouge", "rougeL_recall"),
}
RETAIN = {"probability": ("retain_q_a_prob", "prob"), "rouge_l_recall": ("retain_q_a_rouge", "rougeL_recall")}
TRUTH_RATIO = ("forget_truth_ratio", "score")
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
class ImportArguments:
    """What `cud import` reads."""

    open_unlearning: str | None = field(
        default=None, metadata={"help": "TOFU_EVAL.json of the unlearned model, from open-unlearning."}
    )
    original_open_unlearning: str | None = field(
        default=None, metadata={"help": "That of the model before unlearning."}
    )
    reference_open_unlearning: str | None = field(
        default=None, metadata={"help": "That of a model that never saw the forget set: forget quality."}
    )
    scores: str | None = field(
        default=None, metadata={"help": "Difficulty scores (parquet, csv, jsonl); without them there are no buckets."}
    )
    forget_dataset: str | None = field(
        default=None,
        metadata={"help": "The data that was scored: samples are then joined by their texts, not by position."},
    )
    forget_config: str | None = field(default=None, metadata={"help": "Its configuration name."})
    forget_split: str = field(default="train", metadata={"help": "Its split."})
    metric: str | None = field(default=None, metadata={"help": "Metric that makes the buckets (default: the primary)."})
    n_buckets: int = field(default=4, metadata={"help": "Difficulty buckets, equal in size."})
    show_text: bool = field(
        default=False, metadata={"help": "Put answers and generations into per_sample.parquet. Off: no text anywhere."}
    )
    output_dir: str = field(default="cud-evaluation", metadata={"help": "Where the report goes."})
    overwrite: bool = field(default=False, metadata={"help": "Allow an output directory that is not empty."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap intervals."})

    def __post_init__(self) -> None:
        if not self.open_unlearning:
            raise ValueError("there is nothing to import: give --open_unlearning TOFU_EVAL.json")
        if self.n_buckets < 1:
            raise ValueError(f"n_buckets must be at least 1, got {self.n_buckets}")


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
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
            raise ValueError(f"{path} is no evaluation of open-unlearning: it must map metrics to results")
        if not any("value_by_index" in value for value in found.values()):
            raise ValueError(f"{path} has no values by sample: give the EVAL.json, not the SUMMARY.json")
        return cls(path, {name.lower(): value for name, value in found.items()}, {name.lower(): name for name in found})

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
        given = self.metrics.get(metric, {}).get("agg_value")
        if values is None or (given is not None and np.isclose(aggregate(values).mean(), given, rtol=1e-3, atol=1e-4)):
            return values
        self.used.discard(metric)
        self.skipped[metric] = "another definition (aggregator) than TOFU's"
        return None

    def measured(self, rows: np.ndarray | None) -> harness.Measured:
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
                found = self.ratio(metric, key, true_better)
                found = None if found is None else true_better(found)
            else:
                found = self.column(metric, key)
            if found is not None:
                utility[ours] = found
        kept = None if ratios is None else ratios[order]
        return harness.Measured(sets, statistics={"forget": {}}, truth_ratio=kept, utility=utility)


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

    places: dict[str, list[int]] = {}
    for row, sample in enumerate(dataset):
        places.setdefault(bare(question_and_answer(sample, kind)[1]), []).append(row)
    rows = np.full(len(dataset), -1)
    for index, found in enumerate(samples):
        candidates = places.get(bare(found["ground_truth"]), [])
        if index not in candidates and len(candidates) != 1:
            what = "is not in" if not candidates else "is more than once in"
            raise ValueError(f"{evaluation.path}: the answer of sample {index} {what} the forget dataset")
        rows[index if index in candidates else candidates[0]] = index
    if (rows < 0).any():
        raise ValueError(f"{evaluation.path} has no result for row {int(np.argmin(rows))} of the forget dataset")
    return rows


def import_results(
    after: Evaluation,
    before: Evaluation | None = None,
    reference: Evaluation | None = None,
    *,
    scores: DifficultyScores | None = None,
    dataset: Dataset | None = None,
    metric: str | None = None,
    n_buckets: int = 4,
    seed: int = 0,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Sections of `results.json` (all but `run`), and the table by forget sample, in the order of the scores.

    Args:
        scores: difficulty of the forget samples; without `dataset` in the order of their rows.
        dataset: the data that was scored; results are joined to it by text. Its column `sample_id` or `id`, if there
            is one, finds the scores.

    Raises:
        ValueError: for files that do not fit each other or the scores.
    """
    rows = None if dataset is None else rows_by_text(after, dataset)
    column = None if dataset is None else id_column(dataset.column_names)
    if scores is not None and dataset is not None and column is not None:
        scores = scores.aligned([str(name) for name in dataset[column]])
    measured = {}
    for name, one in (("after", after), ("before", before), ("reference", reference)):
        measured[name] = None if one is None else one.measured(rows)
    own = measured["after"]
    assert own is not None
    size = len(own.sets["forget"]["probability"])
    for name, one in (("before", before), ("reference", reference)):
        if one is not None and len(measured[name].sets["forget"]["probability"]) != size:  # type: ignore[union-attr]
            raise ValueError(f"{one.path} has another number of forget samples than {after.path}, which has {size}")
    if scores is not None and len(scores) != size:
        raise ValueError(f"{after.path} has {size} forget samples, the difficulty scores {len(scores)}")
    bucket = None if scores is None else scores.buckets(metric, n_buckets)
    start = measured["before"]
    results = audit_results(
        own.sets, before=None if start is None else start.sets, scores=scores, metric=metric, n_buckets=n_buckets,
        seed=seed, name=Path(after.path).parent.name or Path(after.path).stem,
    )  # fmt: skip
    known = measured["reference"]
    tables, findings = harness.tables(own, start, known, bucket, n_buckets, seed)
    if scores is not None:
        values = scores[metric or scores.metrics[0]]
        tables.append(sections.reliability_by_decile(values, own.sets["forget"]["probability"], seed))
    rest = others(after)
    if rest is not None:
        tables.append(rest)
    results["tables"], results["findings"] = tables, [*results["findings"], *findings]
    ids = [str(row) for row in range(size)] if scores is None else scores.ids
    frame = pd.DataFrame({"sample_id": ids, **own.per_sample()})
    for name in ("before", "reference"):
        found = measured[name]
        if found is not None:
            frame = frame.assign(**{f"{name}/{key}": value for key, value in found.per_sample().items()})
    if scores is not None and bucket is not None:
        frame = frame.assign(**scores.columns, bucket=bucket + 1)
    return results, frame


def others(evaluation: Evaluation) -> dict[str, Any] | None:
    """A table of the metrics that no other section shows, with their single value."""
    rows: list[tuple[str, list[Any]]] = []
    for name, result in evaluation.metrics.items():
        if name in evaluation.used:
            continue
        value = result.get("agg_value")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
        cell = float(value) if number else sections.missing("no single value")  # type: ignore[arg-type]
        rows.append((evaluation.names[name], [cell, evaluation.skipped.get(name, "no section of its own")]))
    if not rows:
        return None
    return sections.table(
        "open_unlearning", "Other results of open-unlearning",
        "As open-unlearning gives them, over all samples.", ["value", "why it is here"], sorted(rows),
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Entry point of `cud import`."""
    from ..report.page import write_report

    (args,) = parse_options((ImportArguments,), argv, "cud import")
    check_output_dir(args.output_dir, overwrite=args.overwrite)
    scores = DifficultyScores.load(args.scores) if args.scores else None
    if scores is not None:
        scores.buckets(args.metric, args.n_buckets)
    dataset = None
    if args.forget_dataset:
        dataset = load_samples(args.forget_dataset, args.forget_config, args.forget_split, None, "forget")
    paths = (args.open_unlearning, args.original_open_unlearning, args.reference_open_unlearning)
    after, before, reference = (None if path is None else Evaluation.load(path) for path in paths)
    assert after is not None
    results, frame = import_results(
        after, before, reference, scores=scores, dataset=dataset, metric=args.metric, n_buckets=args.n_buckets,
        seed=args.seed,
    )  # fmt: skip
    results["run"] = {
        "command": "cud import " + " ".join(argv),
        "seed": args.seed,
        "versions": versions(),
        "model": dict(zip(("path", "original", "reference"), paths, strict=True)),
        "data": {"n_forget": len(frame)},
        "seconds": {},
    }  # fmt: skip
    if args.show_text:
        texts = after.samples("forget_q_a_rouge")
        if texts is None:
            raise ValueError(f"{after.path} holds no texts: it has no forget_Q_A_ROUGE")
        rows = np.arange(len(frame)) if dataset is None else rows_by_text(after, dataset)
        for key in ("ground_truth", "generation"):
            frame[key] = [texts[row].get(key) for row in rows]
    written = write_report(results, Path(args.output_dir), frame)
    for line in results["findings"]:
        print(f"- {line}")
    skipped = [after.names[name] for name in after.metrics if name not in after.used]
    if skipped:
        print(f"- taken over with their single value only: {', '.join(sorted(skipped))}")
    print(f"report: {written.resolve()}")
    return 0

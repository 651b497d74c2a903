"""`cud import`: the report by difficulty from evaluations that open-unlearning has made; needs no model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from cud_trainer.commands.options import inputs_of
from cud_trainer.commands.parser import parse_options
from cud_trainer.data import id_column
from cud_trainer.data.ids import without_hashes
from cud_trainer.data.sources import load_samples
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.models.fingerprint import versions
from cud_trainer.ownership import REPORT_FILES, clear, output_directory
from cud_trainer.typed import check_options, check_void

from ..metrics.measure import Measured
from ..metrics.open_unlearning import Evaluation, rows_by_text
from ..report.audit import audit_results, check_score_names, measured_tables, per_sample_table
from ..report.difficulty import reliability_by_decile
from ..report.schema import Results, Run
from ..report.story import Evidence, Needs, verdict_of
from ..report.tables import other_results_table
from .endings import answers, last_lines
from .help import IMPORT as ABOUT

MODEL = "needs the model: cud evaluate"
NEEDS = Needs(
    level="--reference_open_unlearning, or the metric mia_loss in open-unlearning's evaluation",
    before="--original_open_unlearning",
    kept="retain_Q_A_Prob in open-unlearning's evaluation",
    parts="By difficulty needs --scores.",
    relearning=MODEL,
    quantisation=MODEL,
    rewording=MODEL,
    sampled=MODEL,
)


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
        check_options(self)
        check_void(self, {"metric": "scores", "n_buckets": "scores"})
        if not self.open_unlearning:
            raise ValueError("there is nothing to import: give --open_unlearning TOFU_EVAL.json")


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
    command: str = "cud import",
) -> tuple[Results, pd.DataFrame]:
    """`Results`, and the table by forget sample, in the order of the scores.

    Args:
        scores: difficulty of the forget samples; without `dataset` in the order of their rows.
        dataset: the data that was scored; results are joined to it by text. Its column `sample_id` or `id`, if there
            is one, finds the scores.
        command: the command line, for the report.

    Raises:
        ValueError: for files that do not fit each other or the scores.
    """
    rows = None if dataset is None else rows_by_text(after, dataset)
    column = None if dataset is None else id_column(dataset.column_names)
    if scores is not None and dataset is not None and column is not None:
        scores = scores.aligned([str(name) for name in dataset[column]])
    ours = after.measured(rows)
    original, never_saw = (None if other is None else other.measured(rows) for other in (before, reference))
    left = ours.sets["forget"]["probability"]
    size = len(left)
    for evaluation, measured in ((before, original), (reference, never_saw)):
        if evaluation is not None and measured is not None and len(measured.sets["forget"]["probability"]) != size:
            raise ValueError(
                f"{evaluation.path} has another number of forget samples than {after.path}, which has {size}"
            )
    if scores is not None and len(scores) != size:
        raise ValueError(f"{after.path} has {size} forget samples, the difficulty scores {len(scores)}")
    buckets = None if scores is None else scores.bucketed(metric, n_buckets)
    paths = {"path": after, "original": before, "reference": reference}
    run = Run(
        command=command,
        seed=seed,
        versions=versions(),
        model={name: None if evaluation is None else evaluation.path for name, evaluation in paths.items()},
        data={"n_forget": size},
        seconds={},
    )
    results = audit_results(
        ours.sets,
        run,
        before=None if original is None else original.sets,
        scores=scores,
        buckets=buckets,
        seed=seed,
        name=Path(after.path).parent.name or Path(after.path).stem,
    )
    seen, without = _with_never_seen([(after, ours), (reference, never_saw)])
    tables, findings = measured_tables(ours, original, never_saw, buckets, seed)
    if scores is not None and buckets is not None:
        tables.append(reliability_by_decile(scores[buckets.metric], left, seed))
    others = after.others()
    if others:
        tables.append(other_results_table(others))
    results.tables = tables
    results.findings += findings
    ids = [str(row) for row in range(size)] if scores is None else scores.ids
    assert seen is not None
    known = Evidence(
        ids=ids,
        after=seen,
        before=original,
        reference=without,
        buckets=buckets,
        wrong=_what_is_wrong(ours, original),
        needs=NEEDS,
    )
    results.verdict = verdict_of(known, seed)
    return results, per_sample_table(ids, ours, original, never_saw, scores, buckets)


def _with_never_seen(models: list[tuple[Evaluation | None, Measured | None]]) -> list[Measured | None]:
    """What was measured of each model, and what `mia_loss` has of samples that nobody saw (for the verdict alone).

    Raises:
        ValueError: where the models have different numbers of these samples.
    """
    made, sizes = [], {}
    for evaluation, measured in models:
        unseen = None if evaluation is None else evaluation.never_seen()
        if evaluation is not None and measured is not None and unseen is not None:
            sizes[evaluation.path] = len(unseen)
            measured = replace(measured, sets=measured.sets | {"holdout": {"probability": unseen}})
        made.append(measured)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"mia_loss has another number of never-seen samples in each of {', '.join(sizes)}")
    return made


def _what_is_wrong(after: Measured, before: Measured | None) -> str | None:
    """Why the model cannot have forgotten, whatever its results are."""
    if before is None or not np.array_equal(after.sets["forget"]["probability"], before.sets["forget"]["probability"]):
        return None
    return "the forget probabilities are the very ones from before unlearning: nothing was unlearned"


def main(argv: list[str]) -> int:
    """Entry point of `cud import`."""
    (args,) = parse_options((ImportArguments,), argv, "cud import", about=ABOUT)
    with output_directory(args.output_dir, REPORT_FILES, inputs=inputs_of(args), overwrite=args.overwrite) as folder:
        return _import(args, folder, argv)


def _import(args: ImportArguments, folder: Path, argv: list[str]) -> int:
    from ..report.page import write_report

    scores = DifficultyScores.load(args.scores) if args.scores else None
    if scores is not None:
        scores.bucketed(args.metric, args.n_buckets)  # refuses before anything else is read
        check_score_names(scores)
    dataset = None
    if args.forget_dataset:
        dataset = load_samples(args.forget_dataset, args.forget_config, args.forget_split, None, "forget")
    paths = (args.original_open_unlearning, args.reference_open_unlearning)
    after = Evaluation.load(str(args.open_unlearning))
    before, reference = (None if path is None else Evaluation.load(path) for path in paths)
    results, frame = import_results(
        after,
        before,
        reference,
        scores=scores,
        dataset=dataset,
        metric=args.metric,
        n_buckets=args.n_buckets,
        seed=args.seed,
        command="cud import " + " ".join(argv),
    )
    if args.show_text:
        frame = with_texts(frame, after, dataset)
    if args.overwrite:
        clear(folder, REPORT_FILES)
    written = write_report(results, folder, frame, keys=() if scores is None else scores.keys)
    for line in results.findings:
        print(f"- {without_hashes(line)}")
    skipped = [name for name, _, _ in after.others()]
    if skipped:
        print(f"- taken over with their single value only: {', '.join(sorted(skipped))}")
    following = "open the report" if scores is not None else "by difficulty: give --scores (cud score)"
    assert results.verdict is not None
    done = f"read {len(frame)} forget samples of {args.open_unlearning}"
    print(without_hashes(last_lines(done, written, following, answers(results.verdict))))
    return 0


def with_texts(frame: pd.DataFrame, evaluation: Evaluation, dataset: Dataset | None) -> pd.DataFrame:
    """`frame` with the true and the generated answer of each forget sample; `ValueError` where the file has none."""
    texts = evaluation.samples("forget_q_a_rouge")
    if texts is None:
        raise ValueError(f"{evaluation.path} holds no texts: it has no forget_Q_A_ROUGE")
    rows = np.arange(len(frame)) if dataset is None else rows_by_text(evaluation, dataset)
    columns = {key: [texts[row].get(key) for row in rows] for key in ("ground_truth", "generation")}
    return pd.concat([frame, pd.DataFrame(columns, index=frame.index)], axis=1)

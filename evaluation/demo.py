"""`cud demo`: the whole line on a small world made on the spot, with a report.

Authors who do not exist -> a Llama that knows them by heart -> difficulty scores -> GradDiff and NPO, each uniform and
difficulty-aware, with the retain weight fitted for each -> comparison at matched retain utility -> report.

No sample helps to score itself (cross-fitting). The seed that chooses the retain weights is not among the seeds that
are reported. Schedules are compared on the worst quarter by outcome, of every run its own, and by seed: the quarter
that CUD ranks hardest is the one that the schedule weights up. Retain utility is measured on questions that the retain
loss never sees (their answers it does: it is robustness to rewording, not wider knowledge).
"""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from cud_trainer.circuits import CircuitTable, Faithfulness, dataset_faithfulness
from cud_trainer.config import DEFAULT_SCHEDULE
from cud_trainer.data import prepare_dataset
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.files import check_output_dir
from cud_trainer.models.fingerprint import versions
from cud_trainer.objectives import UnlearningLoss
from cud_trainer.scoring.calibration import CalibrationSettings

from . import statistics as stats
from .report import audit
from .report import tables as sections
from .study.report import worst_quarter
from .trajectory import Path as RunPath

CIRCUITS_FILE = "circuits.safetensors"
METRICS = ("cud", "cud_paper", "circuit_mass", "loss", "length")
BUCKETS = 4
# Tuned once on the generated set: the forget set is gone within the passes while a good retain weight keeps the rest.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "graddiff": {"learning_rate": 1e-3, "passes": 12},
    "npo": {"learning_rate": 1e-3, "passes": 12},
}
SCHEDULES = ("uniform", DEFAULT_SCHEDULE)


@dataclass
class DemoArguments:
    """Options of `cud demo`."""

    output_dir: str = field(default="cud-demo", metadata={"help": "Where the report and everything behind it go."})
    overwrite: bool = field(default=False, metadata={"help": "Allow an output directory that is not empty."})
    seed: int = field(default=0, metadata={"help": "Of the text, the model and the runs."})
    retain_weights: list[float] = field(
        default_factory=lambda: [4.0, 16.0, 64.0],
        metadata={"help": "Retain weights to choose from, for each condition."},
    )
    report_seeds: int = field(
        default=2, metadata={"help": "Unlearning seeds that are reported; one more chooses the retain weight."}
    )
    retain_level: float = field(
        default=0.95, metadata={"help": "Conditions are compared at this share of the starting retain probability."}
    )
    epochs: int = field(default=20, metadata={"help": "Epochs of memorisation."})
    workers: int | None = field(default=None, metadata={"help": "Unlearning runs at a time (default: one per core)."})

    def __post_init__(self) -> None:
        if not self.retain_weights or any(not weight > 0 for weight in self.retain_weights):
            raise ValueError(f"retain_weights must be positive, got {self.retain_weights}")
        if self.report_seeds < 2:
            raise ValueError(f"report_seeds must be at least 2 (the ceiling compares seeds), got {self.report_seeds}")
        if not 0 < self.retain_level < 1:
            raise ValueError(f"retain_level must be between 0 and 1, got {self.retain_level}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")


@dataclass(frozen=True)
class Job:
    """One unlearning run, as data that can go to another process."""

    output_dir: str
    seed: int
    objective: str
    schedule: str
    retain_weight: float
    run_seed: int
    evaluate: bool = False

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.schedule}-w{self.retain_weight:g}-s{self.run_seed}"


@dataclass
class Outcome:
    """What one run left: its path, and at its end every metric of forget and retain samples if asked for."""

    job: Job
    path: RunPath
    forget: dict[str, np.ndarray] | None = None
    retain: dict[str, np.ndarray] | None = None


def main(argv: list[str]) -> int:
    """Entry point of `cud demo`."""
    from cud_trainer.commands.parser import parse_options

    (args,) = parse_options((DemoArguments,), argv, "cud demo")
    check_output_dir(args.output_dir, overwrite=args.overwrite)
    report = run_demo(args, command="cud demo " + " ".join(argv))
    for line in report["findings"]:
        print(f"- {line}")
    print(f"report: {(Path(args.output_dir) / 'report.html').resolve()}")
    return 0


def run_demo(args: DemoArguments, command: str = "cud demo") -> dict[str, Any]:
    """Everything `cud demo` does; returns the contents of `results.json`."""
    from .report.page import write_report

    _quiet()
    clock = _Clock()
    output = Path(args.output_dir)
    with clock("memorise"):
        before, sizes = _memorise(args, output)
    with clock("difficulty"):
        scores = _score(args, output)
    with clock("unlearn"):
        outcomes, fit = _unlearn(args, output, scores)
    with clock("report"):
        results = _results(args, command, before, sizes, scores, *_circuits(args, output), outcomes, fit)
        results["run"]["seconds"] = clock.seconds
        per_sample = _per_sample(scores, outcomes)
    write_report(results, output, per_sample)
    return results


# -- stages ------------------------------------------------------------------------------------------------------------


def _memorise(args: DemoArguments, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make data, tokenizer and model, train until memorised, save the model; returns what it knows then."""
    from .metrics.memorization import evaluate_memorization
    from .testbed import build_testbed, memorise, tiny_llama, train_tokenizer

    testbed = build_testbed(args.seed)
    tokenizer = train_tokenizer(testbed.texts())
    model = tiny_llama(tokenizer, args.seed)
    memorise(model, tokenizer, testbed, epochs=args.epochs, seed=args.seed)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    before = {}
    for name in ("forget", "retain_eval"):
        prepared = prepare_dataset(getattr(testbed, name), tokenizer, name=name)
        values = evaluate_memorization(model, prepared, tokenizer, batch_size=64, desc=f"measure {name}")
        before["retain" if name == "retain_eval" else name] = audit.means(values, args.seed)
    sizes = {
        "n_forget": len(testbed.forget),
        "n_retain": len(testbed.retain),
        "n_retain_eval": len(testbed.retain_eval),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "vocabulary": len(tokenizer),
    }
    return before, sizes


def _score(args: DemoArguments, output: Path) -> dict[str, DifficultyScores]:
    """Difficulty of the forget set for each objective: the calibration run uses the objective itself."""
    from cud_trainer import score_difficulty

    from .testbed import build_testbed

    testbed, (model, tokenizer) = build_testbed(args.seed), _load(output)
    scores: dict[str, DifficultyScores] = {}
    circuits = output / CIRCUITS_FILE
    circuits.unlink(missing_ok=True)
    for objective, options in OBJECTIVES.items():
        scores[objective] = score_difficulty(
            model,
            testbed.forget,
            tokenizer,
            metrics=METRICS,
            retain_dataset=testbed.retain,
            calibration=CalibrationSettings(
                loss=UnlearningLoss(objective),
                retain_weight=float(np.median(args.retain_weights)),
                learning_rate=options["learning_rate"],
                max_passes=options["passes"] * 3 // 4,
                batch_size=64,
                seed=args.seed,
            ),
            group_column="author",
            batch_size=40,
            seed=args.seed,
            save_circuits=None if circuits.exists() else circuits,  # of the model alone: the same for all objectives
        )
        scores[objective].save(output / f"difficulty-{objective}.parquet", overwrite=args.overwrite)
    return scores


def _circuits(args: DemoArguments, output: Path) -> tuple[CircuitTable, Faithfulness]:
    """The edge scores that scoring has kept, and what their strongest edges do in the original model."""
    from .testbed import build_testbed

    model, tokenizer = _load(output)
    forget = prepare_dataset(build_testbed(args.seed).forget, tokenizer, name="forget")
    table = CircuitTable.load(output / CIRCUITS_FILE).aligned(list(forget["sample_id"]))
    kept = dataset_faithfulness(
        model, forget, audit.strongest_edges(table), pad_token_id=tokenizer.pad_token_id, batch_size=40, seed=args.seed
    )
    return table, kept


def _unlearn(
    args: DemoArguments, output: Path, scores: dict[str, DifficultyScores]
) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """Fit the retain weight of every condition on one seed, then run the reported seeds with it."""
    conditions = list(itertools.product(OBJECTIVES, SCHEDULES))

    def job(objective: str, schedule: str, weight: float, seed: int, evaluate: bool = False) -> Job:
        return Job(str(output), args.seed, objective, schedule, weight, seed, evaluate)

    total = len(conditions) * (len(args.retain_weights) + args.report_seeds)
    with _pool(args.workers) as submit, tqdm(total=total, desc="unlearn", unit="run") as bar:
        fit_jobs = [job(o, s, w, args.seed) for (o, s), w in itertools.product(conditions, args.retain_weights)]
        tried = {outcome.job: outcome for outcome in submit(fit_jobs, bar)}
        fit: list[dict[str, Any]] = []
        chosen: dict[tuple[str, str], float] = {}
        for objective, schedule in conditions:
            hardest = scores[objective].buckets("cud", BUCKETS) == BUCKETS - 1
            rows: list[dict[str, Any]] = []
            for weight in args.retain_weights:
                found = _at_level(tried[job(objective, schedule, weight, args.seed)].path, args.retain_level)
                rows.append(
                    {
                        "objective": objective,
                        "schedule": schedule,
                        "retain_weight": weight,
                        "forget": float(found[0].mean()),
                        "hardest_bucket": float(found[0][hardest].mean()),
                        "chosen": False,
                    }
                )
            best = min(rows, key=lambda row: row["forget"])
            best["chosen"] = True
            chosen[objective, schedule] = best["retain_weight"]
            fit += rows
        final_jobs = [
            job(o, s, chosen[o, s], args.seed + 1 + number, evaluate=number == 0)
            for (o, s), number in itertools.product(conditions, range(args.report_seeds))
        ]
        outcomes = {outcome.job: outcome for outcome in submit(final_jobs, bar)}
    return [outcomes[item] for item in final_jobs], fit


def run_job(job: Job) -> Outcome:
    """One unlearning run from the saved model, with a snapshot after every step."""
    from transformers.trainer_callback import PrinterCallback

    from cud_trainer import CUDConfig, CUDTrainer

    from .metrics.memorization import evaluate_memorization
    from .testbed import build_testbed
    from .trajectory import TradeoffCallback

    _quiet()
    output = Path(job.output_dir)
    testbed, (model, tokenizer) = build_testbed(job.seed), _load(output)
    options = OBJECTIVES[job.objective]
    args = CUDConfig(
        output_dir=str(output / "runs" / job.name),
        objective=job.objective,
        retain_weight=job.retain_weight,
        schedule=job.schedule,
        passes=options["passes"],
        learning_rate=options["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        per_device_train_batch_size=len(testbed.forget) // 2,
        seed=job.run_seed,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        overwrite=True,
    )
    pad = int(tokenizer.pad_token_id)
    forget = prepare_dataset(testbed.forget, tokenizer, name="forget")
    retain = prepare_dataset(testbed.retain_eval, tokenizer, name="retain_eval")
    callback = TradeoffCallback(forget, retain, pad_token_id=pad)
    trainer = CUDTrainer(
        model,
        args,
        forget_dataset=testbed.forget,
        retain_dataset=testbed.retain,
        processing_class=tokenizer,
        difficulty_scores=DifficultyScores.load(output / f"difficulty-{job.objective}.parquet"),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    outcome = Outcome(job, callback.path)
    if job.evaluate:
        outcome.forget = evaluate_memorization(trainer.model, forget, tokenizer, batch_size=64)
        outcome.retain = evaluate_memorization(trainer.model, retain, tokenizer, batch_size=64)
    return outcome


# -- results -----------------------------------------------------------------------------------------------------------


def _at_level(path: RunPath, share: float) -> tuple[np.ndarray, float]:
    """Per-sample forget probability `[N]` where a run has forgotten most at matched retain utility, and its step."""
    forget, retain = np.array(path.forget), np.array(path.retain)
    position = audit.matched_position(retain, forget.mean(1), share * retain[0])
    assert position is not None  # the start is above the level
    return audit.at_position(forget, position), float(audit.at_position(np.array(path.steps), position))


def _results(
    args: DemoArguments,
    command: str,
    before: dict[str, Any],
    sizes: dict[str, Any],
    scores: dict[str, DifficultyScores],
    circuits: CircuitTable,
    kept: Faithfulness,
    outcomes: list[Outcome],
    fit: list[dict[str, Any]],
) -> dict[str, Any]:
    seed = args.seed
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.job.objective, outcome.job.schedule), []).append(outcome)
    findings: list[str] = []
    difficulty, conditions, matched, tables = [], [], [], []
    start = float(outcomes[0].path.retain[0])
    for objective, options in OBJECTIVES.items():
        table = scores[objective]
        bucket = table.buckets("cud", BUCKETS)
        residuals = [audit.averaged_residual(run.path.forget)[0] for run in grouped[objective, "uniform"]]
        section = audit.difficulty_section(
            objective,
            table.columns,
            residuals,
            target=f"answer probability after uniform unlearning, mean over {len(residuals)} seeds and over the "
            "snapshots at which the mean forget probability is 15-75% of its start",
            seed=seed,
        )
        against = audit.spearman_difference(table["cud"], table["loss"], np.mean(residuals, axis=0), seed=seed)
        section["cud_minus_loss"] = against.as_dict()
        if objective == next(iter(OBJECTIVES)):
            note = f"Buckets are those of CUD calibrated for {objective}; what is left is that of {objective}, uniform."
            pictures = audit.circuit_section(
                circuits, bucket, np.mean(residuals, axis=0), seed=seed, note=note, kept=kept
            )
        difficulty.append(section)
        findings.append(_difficulty_finding(objective, section, against))

        rows, by_seed = [], {}
        for schedule in SCHEDULES:
            runs = grouped[objective, schedule]
            found = [_at_level(run.path, args.retain_level) for run in runs]
            left = np.mean([values for values, _ in found], axis=0)
            by_seed[schedule] = {run.job.run_seed: values for run, (values, _) in zip(runs, found, strict=True)}
            rows.append(
                {
                    "schedule": schedule,
                    "retain_weight": runs[0].job.retain_weight,
                    "forget": stats.bootstrap_mean(left, seed=seed).as_dict(),
                    "hardest_bucket": stats.bootstrap_mean(left[bucket == BUCKETS - 1], seed=seed).as_dict(),
                    "steps": float(np.mean([step for _, step in found])),
                    "reason": None,
                }
            )
            conditions.append(_condition(objective, schedule, runs, bucket, options, seed))
        level = args.retain_level * start
        # No difference over samples: two schedules differ from seed to seed by far more.
        matched.append({"objective": objective, "retain_level": level, "rows": rows, "difference": None})
        worst, means = (
            {schedule: {run: float(of(values)) for run, values in found.items()} for schedule, found in by_seed.items()}
            for of in (worst_quarter, np.mean)
        )
        tables.append(_by_seed(objective, worst, means))
        findings.append(_schedule_finding(objective, level, worst, means))
    findings.append(
        "Retain utility is measured on retained facts asked in other words than the retain loss uses; knowledge that "
        "it never mentions is not measured, and falls further. Whether a schedule needs its difficulty is not measured "
        "either: in an audit a random difficulty gave nearly the same. The ceiling is that of few seeds, and noisy."
    )
    return {
        "schema_version": 1,
        "title": "cud demo: which fictitious authors are hard to forget?",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "run": {
            "command": command.strip(),
            "seed": seed,
            "versions": versions(),
            "model": {key: sizes[key] for key in ("parameters", "layers", "hidden_size", "vocabulary")},
            "data": {key: value for key, value in sizes.items() if key.startswith("n_")},
            "seconds": {},
        },
        "before": before,
        "difficulty": {
            "note": "Spearman correlation of each metric, computed before unlearning, with what is left afterwards. "
            "CUD is cross-fitted: anchors never include the author that is scored. One model and one forget set: "
            "intervals are over its samples, not over models.",
            "objectives": difficulty,
        },
        "circuits": pictures,
        "conditions": conditions,
        "retain_weight_fit": fit,
        "fit_note": "Fitted for each condition on a seed of its own, by the lowest mean forget probability at matched "
        "retain utility.",
        "matched": matched,
        "tables": tables,
        "findings": findings,
    }


def _condition(
    objective: str, schedule: str, runs: list[Outcome], bucket: np.ndarray, options: dict[str, Any], seed: int
) -> dict[str, Any]:
    curve = [
        {
            "seed": run.job.run_seed,
            "step": step,
            "retain": retain,
            "forget": float(forget.mean()),
            "buckets": [float(forget[bucket == number].mean()) for number in range(BUCKETS)],
        }
        for run in runs
        for step, retain, forget in zip(run.path.steps, run.path.retain, run.path.forget, strict=True)
    ]
    last = next(run for run in runs if run.forget is not None and run.retain is not None)
    assert last.forget is not None and last.retain is not None
    return {
        "name": f"{objective} / {schedule}",
        "objective": objective,
        "schedule": schedule,
        "retain_weight": runs[0].job.retain_weight,
        "learning_rate": options["learning_rate"],
        "passes": options["passes"],
        "seeds": [run.job.run_seed for run in runs],
        "curve": curve,
        "final": {
            "seed": last.job.run_seed,
            "forget": audit.means(last.forget, seed),
            "retain": audit.means(last.retain, seed),
            "buckets": audit.by_bucket(last.forget, bucket, seed),
        },
    }


def _difficulty_finding(objective: str, section: dict[str, Any], against: stats.Interval) -> str:
    found = {row["metric"]: row["spearman"] for row in section["rows"]}
    partial = next(row["partial"] for row in section["rows"] if row["metric"] == "cud")
    return (
        f"{objective}: Spearman with residual memorisation: CUD {audit.shown(found['cud'])}, its top-k cosine form "
        f"(cud_paper, inspired by the paper, not as published) {audit.shown(found['cud_paper'])}, circuit mass "
        f"{audit.shown(found['circuit_mass'])}, initial loss {audit.shown(found['loss'])}; between seeds "
        f"{section['ceiling']['agreement']['value']:.2f}. CUD less loss {audit.shown(against.as_dict())}; CUD given "
        f"loss and length {audit.shown(partial)}. Intervals are over the samples of one model, and "
        "say nothing of another."
    )


BySeed = dict[str, dict[int, float]]  # a figure of each schedule and seed


def _schedule_finding(objective: str, level: float, worst: BySeed, means: BySeed) -> str:
    change = _change(worst)
    beyond = np.isfinite(change.low) and not change.low <= 0 <= change.high
    verdict = ("less" if change.value < 0 else "more") + " than with uniform" if beyond else "undecided"
    return (
        f"{objective} at retain probability {level:.3f}, worst quarter by outcome, seed by seed: {_seeds(worst)}; "
        f"change {_percent(change)} over {len(worst[SCHEDULES[0]])} seeds: {verdict}. Mean of all "
        f"samples: {_seeds(means)}."
    )


def _change(found: BySeed) -> stats.Interval:
    """Of the difficulty-aware schedule from `uniform`, paired by seed."""
    uniform, aware = (found[schedule] for schedule in SCHEDULES)
    return stats.paired_change(*(np.array([values[run] for run in sorted(uniform)]) for values in (aware, uniform)))


def _seeds(found: BySeed) -> str:
    return ", ".join(
        f"{schedule} " + " ".join(f"{found[schedule][run]:.3f}" for run in sorted(found[schedule]))
        for schedule in SCHEDULES
    )


def _percent(change: stats.Interval) -> str:
    if not np.isfinite(change.value):
        return "n/a"
    high = f"{100 * change.high:+.0f}" if change.high < 10 else "more than +1000"
    return f"{100 * change.value:+.0f}% [{100 * change.low:+.0f}, {high}]"


def _by_seed(objective: str, worst: BySeed, means: BySeed) -> dict[str, Any]:
    """The table behind the finding."""
    return sections.table(
        f"seeds-{objective}",
        f"{objective}: schedules by seed, at matched retain utility",
        "The worst quarter is picked by the result, of each run its own. Change: geometric mean over seeds, with "
        "its 95% t interval over seeds of the paired log ratio.",
        ["worst quarter by outcome", "all samples"],
        [
            *(
                (f"{schedule}, seed {run}", [worst[schedule][run], means[schedule][run]])
                for schedule in SCHEDULES
                for run in sorted(worst[schedule])
            ),
            (f"change with {SCHEDULES[1]}", [_percent(_change(worst)), _percent(_change(means))]),
        ],
    )


def _per_sample(scores: dict[str, DifficultyScores], outcomes: list[Outcome]) -> pd.DataFrame:
    """One row per forget sample: difficulty by objective, and what every reported run left at its end. No text."""
    first = next(iter(scores.values()))
    frame = pd.DataFrame({"sample_id": first.ids, "fold": first.fold})
    for objective, table in scores.items():
        for name, values in table.columns.items():
            frame[f"{objective}/{name}"] = values
        frame[f"{objective}/bucket"] = table.buckets("cud", BUCKETS) + 1
    for outcome in outcomes:
        frame[f"{outcome.job.name}/probability"] = outcome.path.forget[-1]
        for name, values in (outcome.forget or {}).items():
            frame[f"{outcome.job.name}/{name}"] = values
    return frame


# -- plumbing ----------------------------------------------------------------------------------------------------------


class _Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 1)


@contextmanager
def _pool(workers: int | None) -> Iterator[Any]:
    """Yields `submit(jobs, bar)`, which runs jobs and yields outcomes as they finish.

    The runs are too small to use several threads each, so cores take one run each. With an accelerator they run one
    after the other.
    """
    if workers is None:
        workers = 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8)
    if workers == 1:

        def serial(jobs: list[Job], bar: tqdm) -> Iterator[Outcome]:
            for job in jobs:
                yield run_job(job)
                bar.update()

        yield serial
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as executor:

        def parallel(jobs: list[Job], bar: tqdm) -> Iterator[Outcome]:
            for future in as_completed([executor.submit(run_job, job) for job in jobs]):
                yield future.result()
                bar.update()

        yield parallel


def _one_thread() -> None:
    torch.set_num_threads(1)


def _load(output: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(output / "model")


def _quiet() -> None:
    """Only this project's own messages: the demo builds many trainers."""
    import datasets
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

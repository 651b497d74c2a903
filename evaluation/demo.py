"""`cud demo`: the whole line on a small world made on the spot, with a report.

Authors who do not exist -> a Llama that knows them by heart -> difficulty scores -> GradDiff and NPO, each uniform and
difficulty-aware, with the retain weight fitted for each -> comparison at matched retain utility -> report.

Honest by construction: no sample helps to score itself (cross-fitting). Retain utility is measured on questions that
the retain loss never sees (their answers it does: it is robustness to rewording, not wider knowledge). The seed that
chooses the retain weights is not among the seeds that are reported.
"""

from __future__ import annotations

import datetime
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cud_trainer.circuits import CircuitTable, Faithfulness, dataset_faithfulness
from cud_trainer.config import DEFAULT_SCHEDULE
from cud_trainer.data import prepare_dataset
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.files import check_output_dir
from cud_trainer.models.fingerprint import versions
from cud_trainer.objectives import UnlearningLoss
from cud_trainer.scoring.calibration import CalibrationSettings

from . import statistics as stats
from .metrics.memorization import TOKEN_STATISTICS
from .report import audit
from .study.report import condition
from .study.runs import Run, grouped, left_at, trials, tuned

CIRCUITS_FILE = "circuits.safetensors"
SETS = ("forget", "retain", "retain_eval")
METRICS = ("cud", "cud_paper", "circuit_mass", "loss", "length")
BUCKETS = 4
OBJECTIVES = ("graddiff", "npo")
# Tuned once on the generated set: the forget set is gone within the passes while a good retain weight keeps the rest.
LEARNING_RATE, PASSES = 1e-3, 12
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
        runs = _unlearn(args, output, sizes["n_forget"])
    with clock("report"):
        results = _results(args, command, before, sizes, scores, *_circuits(args, output), runs)
        results["run"]["seconds"] = clock.seconds
        per_sample = _per_sample(scores, _reported(runs, args))
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
    for name in SETS:
        getattr(testbed, name).to_json(_data(output, name))
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
    for objective in OBJECTIVES:
        scores[objective] = score_difficulty(
            model,
            testbed.forget,
            tokenizer,
            metrics=METRICS,
            retain_dataset=testbed.retain,
            calibration=CalibrationSettings(
                loss=UnlearningLoss(objective),
                retain_weight=float(np.median(args.retain_weights)),
                learning_rate=LEARNING_RATE,
                max_passes=PASSES * 3 // 4,
                batch_size=64,
                seed=args.seed,
            ),
            group_column="author",
            batch_size=40,
            seed=args.seed,
            save_circuits=None if circuits.exists() else circuits,  # of the model alone: the same for all objectives
        )
        scores[objective].save(_scores_file(output, objective), overwrite=args.overwrite)
    return scores


def _circuits(args: DemoArguments, output: Path) -> tuple[CircuitTable, Faithfulness]:
    """The edge scores that scoring has kept, and what their strongest edges do in the original model."""
    from .testbed import build_testbed

    model, tokenizer = _load(output)
    forget = prepare_dataset(build_testbed(args.seed).forget, tokenizer, name="forget")
    table = CircuitTable.load(output / CIRCUITS_FILE).aligned(list(forget["sample_id"]))
    faithfulness = dataset_faithfulness(
        model, forget, audit.strongest_edges(table), pad_token_id=tokenizer.pad_token_id, batch_size=40, seed=args.seed
    )
    return table, faithfulness


def _unlearn(args: DemoArguments, output: Path, n_forget: int) -> list[Run]:
    """A study in `output`/study: every retain weight on one seed, then the reported seeds with the best of each."""
    from trl import ModelConfig

    from .study.engine import run_study
    from .study.options import StudyArguments

    folder = output / "study"
    shutil.rmtree(folder, ignore_errors=True)  # runs of other code are no runs of this one
    workers = args.workers or (1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8))
    if workers > 1:  # the runs are too small to use several threads each
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    study = StudyArguments(
        **{f"{name}_dataset": str(_data(output, name)) for name in ("forget", "retain")},
        utility_dataset=str(_data(output, "retain_eval")),
        output_dir=str(folder),
        workers=workers,
        retain_level=[args.retain_level],
        tune_on="all",
        generate_seeds=[args.seed + 1],
        n_buckets=BUCKETS,
        grid=[
            {
                "objective": [objective],
                "difficulty_scores": [str(_scores_file(output, objective))],
                "schedule": list(SCHEDULES),
                "retain_weight": list(dict.fromkeys(args.retain_weights)),
                "seed": [args.seed + number for number in range(1 + args.report_seeds)],
            }
            for objective in OBJECTIVES
        ],
        train={
            "passes": PASSES,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 2,
            "per_device_train_batch_size": n_forget // 2,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
        },
    )
    finished = run_study(study, ModelConfig(model_name_or_path=str(output / "model")))
    for name, reason in finished.failed.items():
        raise ValueError(f"run {name} failed: {reason}")
    return finished.runs()


# -- results -----------------------------------------------------------------------------------------------------------


def _reported(runs: list[Run], args: DemoArguments) -> list[Run]:
    """Of each condition, the runs with the retain weight that leaves least on the first seed; the other seeds."""
    chosen = []
    for same in grouped(runs, attrgetter("panel", "schedule")).values():
        chosen += [run for run in tuned(same, args.retain_level, tune_on="all") if run.seed != args.seed]
    return chosen


def _results(
    args: DemoArguments,
    command: str,
    before: dict[str, Any],
    sizes: dict[str, Any],
    scores: dict[str, DifficultyScores],
    circuits: CircuitTable,
    faithfulness: Faithfulness,
    runs: list[Run],
) -> dict[str, Any]:
    """The contents of `results.json`, but for the seconds."""
    seed = args.seed
    by_condition = grouped(_reported(runs, args), attrgetter("panel", "schedule"))
    fit = []
    for (objective, schedule), same in grouped(runs, attrgetter("panel", "schedule")).items():
        fit += trials(same, by_condition[objective, schedule], args.retain_level, objective)
    findings: list[str] = []
    difficulty, conditions, matched = [], [], []
    for objective in OBJECTIVES:
        uniform = by_condition[objective, SCHEDULES[0]]
        residuals = [audit.averaged_residual(list(run.forget))[0] for run in uniform]
        section, against = _difficulty(objective, scores[objective], residuals, seed)
        if objective == OBJECTIVES[0]:
            note = f"Buckets are those of CUD calibrated for {objective}; what is left is that of {objective}, uniform."
            pictures = audit.circuit_section(
                circuits, uniform[0].bucket, np.mean(residuals, axis=0), seed=seed, note=note, kept=faithfulness
            )
        difficulty.append(section)
        findings.append(_difficulty_finding(objective, section, against))
        chosen = {schedule: by_condition[objective, schedule] for schedule in SCHEDULES}
        conditions += [
            {**condition(objective, schedule, group, seed), "passes": PASSES} for schedule, group in chosen.items()
        ]
        matched.append(_matched(objective, chosen, args))
        findings.append(_schedule_finding(objective, matched[-1]))
    findings.append(
        "Retain utility is measured on retained facts asked in other words than the retain loss uses; knowledge that "
        "it never mentions is not measured. The ceiling is that of few seeds, and noisy."
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
        "findings": findings,
    }


def _difficulty(
    objective: str, scores: DifficultyScores, residuals: list[np.ndarray], seed: int
) -> tuple[dict[str, Any], stats.Interval]:
    """How well each metric predicts what uniform runs leave, and by how much CUD does better than the loss."""
    section = audit.difficulty_section(
        objective,
        scores.columns,
        residuals,
        target=f"answer probability after uniform unlearning, mean over {len(residuals)} seeds and over the "
        "snapshots at which the mean forget probability is 15-75% of its start",
        seed=seed,
    )
    against = audit.spearman_difference(scores["cud"], scores["loss"], np.mean(residuals, axis=0), seed=seed)
    section["cud_minus_loss"] = against.as_dict()
    return section, against


def _matched(objective: str, chosen: dict[str, list[Run]], args: DemoArguments) -> dict[str, Any]:
    """What each schedule leaves at matched retain utility, and the difference."""
    left = left_at(chosen, args.retain_level)
    hardest = chosen[SCHEDULES[0]][0].hardest
    rows = [
        {
            "schedule": schedule,
            "retain_weight": group[0].options["retain_weight"],
            "forget": stats.bootstrap_mean(left[schedule], seed=args.seed).as_dict(),
            "hardest_bucket": stats.bootstrap_mean(left[schedule][hardest], seed=args.seed).as_dict(),
            "steps": float(np.mean([run.at(args.retain_level)[1] for run in group])),
            "reason": None,
        }
        for schedule, group in chosen.items()
    ]
    uniform, aware = (left[schedule] for schedule in SCHEDULES)
    difference = {
        "schedule": SCHEDULES[1],
        "against": SCHEDULES[0],
        "forget": stats.paired_difference(aware, uniform, seed=args.seed).as_dict(),
        "hardest_bucket": stats.paired_difference(aware[hardest], uniform[hardest], seed=args.seed).as_dict(),
    }
    level = args.retain_level * float(chosen[SCHEDULES[0]][0].retain[0])
    return {"objective": objective, "retain_level": level, "rows": rows, "difference": difference}


def _verdict(interval: dict[str, Any], lower: str, higher: str) -> str:
    """Stated rule: the 95% interval must exclude 0."""
    if not np.isfinite(interval["value"]):
        return "not to be compared (undefined)"
    if interval["high"] < 0:
        return lower
    return higher if interval["low"] > 0 else "no different within the noise"


def _difficulty_finding(objective: str, section: dict[str, Any], against: stats.Interval) -> str:
    found = {row["metric"]: row["spearman"] for row in section["rows"]}
    partial = next(row["partial"] for row in section["rows"] if row["metric"] == "cud")
    verdict = _verdict(against.as_dict(), "worse than the loss", "better than the loss")
    return (
        f"{objective}: Spearman with residual memorisation: CUD {audit.shown(found['cud'])}, as published "
        f"{audit.shown(found['cud_paper'])}, circuit mass {audit.shown(found['circuit_mass'])}, initial loss "
        f"{audit.shown(found['loss'])}; between seeds {section['ceiling']['agreement']['value']:.2f}. CUD is {verdict} "
        f"(difference {audit.shown(against.as_dict())}); given loss and length {audit.shown(partial)}."
    )


def _schedule_finding(objective: str, matched: dict[str, Any]) -> str:
    uniform, aware = matched["rows"]
    difference = matched["difference"]["hardest_bucket"]
    verdict = _verdict(difference, "less is left than with uniform", "more is left than with uniform")
    return (
        f"{objective} at retain probability {matched['retain_level']:.3f}: hardest quarter left "
        f"{audit.shown(uniform['hardest_bucket'])} with uniform (retain weight {uniform['retain_weight']:g}), "
        f"{audit.shown(aware['hardest_bucket'])} with {aware['schedule']} (retain weight {aware['retain_weight']:g}); "
        f"difference {audit.shown(difference)}: {verdict}. All samples: difference "
        f"{audit.shown(matched['difference']['forget'])}."
    )


def _per_sample(scores: dict[str, DifficultyScores], runs: list[Run]) -> pd.DataFrame:
    """One row per forget sample: difficulty by objective, and what every reported run left at its end. No text."""
    first = next(iter(scores.values()))
    frame = pd.DataFrame({"sample_id": first.ids, "fold": first.fold})
    for objective, table in scores.items():
        for name, values in table.columns.items():
            frame[f"{objective}/{name}"] = values
        frame[f"{objective}/bucket"] = table.buckets("cud", BUCKETS) + 1
    for run in runs:
        label = f"{run.panel}-{run.schedule}-w{run.options['retain_weight']:g}-s{run.seed}"
        frame[f"{label}/probability"] = run.forget[-1]
        if run.cell.settings.get("generate"):
            for name, values in run.final["forget"].items():
                if name not in TOKEN_STATISTICS:
                    frame[f"{label}/{name}"] = values
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


def _data(output: Path, name: str) -> Path:
    """One of `SETS`, as the runs read it."""
    return output / "data" / f"{name}.jsonl"


def _scores_file(output: Path, objective: str) -> Path:
    return output / f"difficulty-{objective}.parquet"


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

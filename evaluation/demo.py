"""`cud demo`: the whole line on a small world made on the spot, with a report.

Authors who do not exist -> a Llama that knows them by heart -> difficulty scores -> GradDiff and NPO, each as published
(`uniform`), by default (`preserve`), and by default with CUD and with a random difficulty -> comparison -> report.

No sample helps to score itself (cross-fitting). Nothing is tuned here: the retain weights of `uniform` did best on
another model (benchmarks/evidence/development.yaml). Arms are compared by what is kept of authors that no loss sees,
once the worst quarter by outcome is forgotten, seed by seed, and by the rule of every study (`decision`): the quarter
that CUD ranks hardest is the one that the schedule weights up, and says nothing. Retain utility is measured on
questions that the retain loss never sees (their answers it does: it is robustness to rewording, not wider knowledge).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cud_trainer.circuits import CircuitTable, Faithfulness, dataset_faithfulness
from cud_trainer.data import prepare_samples
from cud_trainer.data.ids import KEY_FILE
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.objectives import UnlearningLoss
from cud_trainer.ownership import REPORT_FILES, clear, output_directory
from cud_trainer.scoring.calibration import CalibrationSettings
from cud_trainer.typed import check_options, defaults

from . import demo_report
from .commands.endings import answers_of_runs, last_lines
from .commands.help import DEMO
from .demo_report import BUCKETS, OBJECTIVES, UNIFORM_WEIGHTS, arms
from .report.cells import means
from .report.circuits import strongest_edges

if TYPE_CHECKING:
    from datasets import Dataset

    from .study.engine import Finished
    from .testbed import Testbed

CIRCUITS_FILE = "circuits.safetensors"
DEMO_FILES = ("model", "data", "study", "difficulty-*.parquet", CIRCUITS_FILE, KEY_FILE, *REPORT_FILES)
SETS = ("forget", "retain", "retain_eval", "held_out")
NEVER_SEEN = "never_seen"  # as many samples as the forget set, of authors whom the model never meets
HELD_OUT_AUTHORS = 6
DIFFICULTY_METRICS = ("cud", "cud_top_k", "circuit_mass", "loss", "length", "random")
# Looked at on another model: the forget set is gone within the passes, by default and with `uniform`.
LEARNING_RATE, PASSES = 2e-3, 24
# `--tiny`: a world and a model small enough to try the installation with. Figures of it say nothing.
TINY: dict[str, Any] = {"report_seeds": 2}
TINY_WORLD = {"n_forget_authors": 6, "n_retain_authors": 4, "n_heldout_authors": 2, "facts_per_author": 6}
TINY_MODEL = {"layers": 2, "hidden_size": 64, "intermediate_size": 128}


@dataclass
class DemoArguments:
    """Options of `cud demo`."""

    output_dir: str = field(default="cud-demo", metadata={"help": "Where the report and everything behind it go."})
    overwrite: bool = field(default=False, metadata={"help": "Allow an output directory that is not empty."})
    seed: int = field(default=0, metadata={"help": "Of the text, the model and the runs."})
    report_seeds: int = field(default=3, metadata={"help": "Unlearning seeds of each arm."})
    retain_level: float = field(
        default=0.95, metadata={"help": "Conditions are compared at this share of the starting retain probability."}
    )
    epochs: int = field(default=20, metadata={"help": "Epochs of memorisation."})
    workers: int | None = field(default=None, metadata={"help": "Unlearning runs at a time (default: one per core)."})
    tiny: bool = field(
        default=False,
        metadata={"help": "Try the installation: a smaller world and model, one objective, fewer seeds. No result."},
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.tiny:
            usual = defaults(DemoArguments)
            for name, value in TINY.items():  # what was asked for stays
                if getattr(self, name) == usual[name]:
                    setattr(self, name, value)
        if not 0 < self.retain_level < 1:
            raise ValueError(f"retain_level must be between 0 and 1, got {self.retain_level}")


def main(argv: list[str]) -> int:
    """Entry point of `cud demo`."""
    from cud_trainer.commands.parser import parse_options

    (args,) = parse_options((DemoArguments,), argv, "cud demo", about=DEMO)
    with output_directory(args.output_dir, DEMO_FILES, inputs={}, overwrite=args.overwrite) as folder:
        if args.overwrite:
            clear(folder, DEMO_FILES)
        report = run_demo(args, command="cud demo " + " ".join(argv))
    seconds = sum(report["run"]["seconds"].values())
    following = "open the report; your own samples: cud train --help, recipes/own_data.yaml"
    done = f"memorised, scored, unlearned and compared in {seconds:.0f} s"
    found = answers_of_runs(report["verdicts"])
    found += [f"does difficulty earn its place? {arm.objective}: {arm.verdict}" for arm in report["decision"].arms]
    print(last_lines(done, Path(args.output_dir) / "report.html", following, [*found, demo_report.CAVEAT]))
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
        finished = _unlearn(args, output, sizes["n_forget"])
        runs = {objective: study.runs() for objective, study in finished.items()}
    with clock("report"):
        circuits, faithfulness = _circuits(args, output)
        results = demo_report.results(
            command,
            before,
            sizes,
            scores,
            circuits,
            faithfulness,
            runs,
            finished,
            retain_level=args.retain_level,
            seed=args.seed,
        )
        results["run"]["seconds"] = clock.seconds
        per_sample = demo_report.per_sample(scores, runs)
    write_report(results, output, per_sample)
    return results


# -- stages ------------------------------------------------------------------------------------------------------------


def _memorise(args: DemoArguments, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make data, tokenizer and model, train until memorised, save the model; returns what it knows then."""
    from .metrics.memorization import evaluate_memorization
    from .testbed import memorise, tiny_llama, train_tokenizer

    testbed = _world(args)
    tokenizer = train_tokenizer(testbed.texts())
    model = tiny_llama(tokenizer, args.seed, **TINY_MODEL if args.tiny else {})
    memorise(model, tokenizer, testbed, epochs=args.epochs, seed=args.seed)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    for name in SETS:
        getattr(testbed, name).to_json(_data(output, name))
    never_seen = _never_seen(args)
    never_seen.to_json(_data(output, NEVER_SEEN))
    before = {}
    for name in ("forget", "retain_eval", "held_out"):
        prepared = prepare_samples(getattr(testbed, name), tokenizer, name=name)
        values = evaluate_memorization(model, prepared, tokenizer, batch_size=64, desc=f"measure {name}")
        before["retain" if name == "retain_eval" else name] = means(values, args.seed)
    sizes = {
        "n_forget": len(testbed.forget),
        "n_retain": len(testbed.retain),
        "n_retain_eval": len(testbed.retain_eval),
        "n_held_out": len(testbed.held_out or ()),
        "n_never_seen": len(never_seen),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "vocabulary": len(tokenizer),
    }
    return before, sizes


def _score(args: DemoArguments, output: Path) -> dict[str, DifficultyScores]:
    """Difficulty of the forget set for each objective: the calibration run uses the objective itself."""
    from cud_trainer import score_difficulty

    testbed, (model, tokenizer) = _world(args), _load(output)
    scores: dict[str, DifficultyScores] = {}
    circuits = output / CIRCUITS_FILE
    circuits.unlink(missing_ok=True)
    for objective in objectives(args):
        scores[objective] = score_difficulty(
            model,
            testbed.forget,
            tokenizer,
            metrics=DIFFICULTY_METRICS,
            retain_dataset=testbed.retain,
            calibration=CalibrationSettings(
                loss=UnlearningLoss(objective),
                retain_weight=UNIFORM_WEIGHTS[objective],
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
    model, tokenizer = _load(output)
    forget = prepare_samples(_world(args).forget, tokenizer, name="forget")
    table = CircuitTable.load(output / CIRCUITS_FILE).aligned(list(forget["sample_id"]))
    faithfulness = dataset_faithfulness(model, forget, strongest_edges(table), batch_size=40, seed=args.seed)
    return table, faithfulness


def _unlearn(args: DemoArguments, output: Path, n_forget: int) -> dict[str, Finished]:
    """A study of each objective in `output`/study."""
    from trl import ModelConfig

    from .study.engine import run_study
    from .study.options import StudyArguments
    from .study.pool import Pool

    folder = output / "study"
    shutil.rmtree(folder, ignore_errors=True)  # runs of other code are no runs of this one
    workers = args.workers or (1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8))
    if workers > 1:  # the runs are too small to use several threads each
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {}
    with Pool(workers) as pool:
        for objective in objectives(args):
            study = StudyArguments(
                forget_dataset=str(_data(output, "forget")),
                retain_dataset=str(_data(output, "retain")),
                utility_dataset=str(_data(output, "retain_eval")),
                heldout_dataset=str(_data(output, "held_out")),
                holdout_dataset=str(_data(output, NEVER_SEEN)),
                extensions=0,
                output_dir=str(folder / objective),
                workers=workers,
                retain_level=[args.retain_level],
                generate_seeds=[args.seed],
                n_buckets=BUCKETS,
                grid={"seed": [args.seed + number for number in range(args.report_seeds)]},
                arms=arms(objective),
                train={
                    "objective": objective,
                    "difficulty_scores": str(_scores_file(output, objective)),
                    "group_column": "author",
                    "passes": PASSES,
                    "learning_rate": LEARNING_RATE,
                    "lr_scheduler_type": "constant_with_warmup",
                    "warmup_steps": 2,
                    "per_device_train_batch_size": n_forget // 2,
                    "bf16": False,
                    "gradient_checkpointing": False,
                },
            )
            found[objective] = run_study(study, ModelConfig(model_name_or_path=str(output / "model")), pool)
            for name, reason in found[objective].failed.items():
                raise ValueError(f"run {name} of {objective} failed: {reason}")
    return found


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


def objectives(args: DemoArguments) -> tuple[str, ...]:
    """Those that are compared: of `--tiny` the last one."""
    return OBJECTIVES[-1:] if args.tiny else OBJECTIVES


def _world(args: DemoArguments) -> Testbed:
    from .testbed import build_testbed

    sizes: dict[str, Any] = TINY_WORLD if args.tiny else {"n_heldout_authors": HELD_OUT_AUTHORS}
    return build_testbed(args.seed, **sizes)


def _never_seen(args: DemoArguments) -> Dataset:
    """Facts of further authors of the same world."""
    from datasets import Dataset

    from .testbed import fictitious_authors

    testbed = _world(args)
    known = [set(part["author"]) for part in (testbed.forget, testbed.retain, testbed.held_out or {"author": ()})]
    met, facts = sum(map(len, known)), len(testbed.forget) // len(known[0])
    rows = fictitious_authors(met + len(known[0]), facts, args.seed)
    return Dataset.from_list(rows[met * facts :])


def _data(output: Path, name: str) -> Path:
    """One of `SETS`, or `NEVER_SEEN`, as the runs read it."""
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

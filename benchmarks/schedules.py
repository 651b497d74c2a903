"""Which schedule leaves less at equal retain utility: `cud study` on models that know their data.

    python benchmarks/schedules.py --tofu locuslab/TOFU

For every testbed (two worlds of generated authors, TOFU with a small Llama, and TOFU with SmolLM2), a model learns the
data by heart, and another one all but the forget set; the difficulty of every forget sample is scored once for each
objective and part (cross-fitted by author, calibration seed 0); then `cud study` runs benchmarks/schedules/*.yaml, and
what it found is put together in benchmarks/results/schedules.*, in place of what stood there about the same studies.
Everything is kept in `--work_dir`: a killed run goes on there.

In the studies `difficulty: calibration` is the oracle: what another uniform run of the same objective left of each
sample. It bounds what a metric known before unlearning could give.
"""

import argparse
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cud_trainer.files import write_json

HERE = Path(__file__).parent
STUDIES = HERE / "schedules"
METRICS = ("cud", "calibration", "circuit_mass", "grad_norm", "loss", "length")
CALIBRATION_WEIGHT = 4.0
SEEDS = {"generated-second": 1}  # of world and model; 0 of all other studies


@dataclass(frozen=True)
class Bed:
    """A testbed: which data, and how long which model learns it (by default a small Llama from scratch)."""

    name: str
    tofu: bool
    epochs: int
    batch: int
    forget_config: str = "forget10"
    retain: int = 800
    model: str | None = None
    lora_scale: float = 1.0  # times the learning rates of calibration with LoRA
    passes: int = 15  # of calibration at most


BEDS = {
    "generated": Bed("generated", False, 20, 40),
    "tofu": Bed("tofu", True, 18, 40, lora_scale=5.0),
    "smollm2": Bed(
        "smollm2",
        True,
        4,
        8,
        forget_config="forget05",
        retain=200,
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        lora_scale=4.0,
        passes=5,
    ),
}


def prepare(args: argparse.Namespace, bed: Bed, seed: int) -> Path:
    """Model and data of a testbed on disk, as `cud` reads them, and what a model says that never saw the forget set."""
    sys.path.insert(0, str(HERE))
    from difficulty import data, save_data, save_model
    from schedules_report import NEVER_SEEN

    folder = Path(args.work_dir) / f"{bed.name}-{seed}"
    options = argparse.Namespace(
        tofu=args.tofu if bed.tofu else None,
        model=bed.model and (args.smollm2 or bed.model),
        forget_config=bed.forget_config,
        forget=200,
        retain=bed.retain,
        batch=bed.batch,
        epochs=bed.epochs,
    )
    folder.mkdir(parents=True, exist_ok=True)
    testbed = data(options, seed)
    if not (folder / "model").exists():
        save_model(options, testbed, seed, folder / "part")
        os.replace(folder / "part" / "model", folder / "model")
    save_data(testbed, folder)
    if not (folder / NEVER_SEEN).exists():
        write_json(folder / NEVER_SEEN, never_seen(options, testbed, seed))
    return folder


def never_seen(options: argparse.Namespace, testbed: Any, seed: int) -> list[float]:
    """Answer probability of every forget sample under a model that learned all but the forget set."""
    from difficulty import memorised

    from cud_trainer.data import prepare_samples
    from cud_trainer.logprobs import answer_probability

    rest = testbed.train.filter(lambda split: split != "forget", input_columns="split")
    model, tokenizer, _ = memorised(options, testbed, seed, rest)
    forget = prepare_samples(testbed.forget, tokenizer, name="forget")
    return answer_probability(model, forget).tolist()


def score(folder: Path, bed: Bed, objective: str, part: str) -> None:
    """Difficulty of every forget sample for an objective, `scores-OBJECTIVE-PART.parquet`."""
    from datasets import load_dataset
    from difficulty import MEASURED, OBJECTIVES, PARTS
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cud_trainer import score_difficulty
    from cud_trainer.objectives import UnlearningLoss
    from cud_trainer.scoring.calibration import CalibrationSettings

    path = folder / f"scores-{objective}-{part}.parquet"
    if path.exists():
        return
    forget, retain = (
        load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split="train") for name in ("forget", "retain")
    )
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if part == "lora" else None
    rate = OBJECTIVES[objective][PARTS.index(part)] * (bed.lora_scale if adapter else 1.0)
    calibration = CalibrationSettings(
        loss=UnlearningLoss(objective),
        retain_weight=CALIBRATION_WEIGHT,
        seed=0,
        max_passes=bed.passes,
        learning_rate=rate,
        batch_size=bed.batch + 10,
        peft_config=adapter,
    )
    score_difficulty(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        forget,
        AutoTokenizer.from_pretrained(folder / "model"),
        metrics=METRICS,
        metric_args=MEASURED,
        retain_dataset=retain,
        calibration=calibration,
        group_column="author",
        seed=0,
        batch_size=bed.batch,
        progress=False,
    ).save(path)


def study(args: argparse.Namespace, folder: Path, name: str, settings: dict, objective: str) -> Path:
    """Run the part of a study that is about one objective, in the folder of its testbed."""
    output = f"{name}-{objective}"
    part = {**settings, "grid": [grid for grid in settings["grid"] if grid["objective"] == [objective]]}
    part["train"] = {"preserve": False, **settings["train"]}
    (folder / f"{output}.yaml").write_text(yaml.safe_dump(part, sort_keys=False))
    command = [sys.executable, "-m", "cud_trainer.cli", "study", "--config", f"{output}.yaml"]
    command += ["--output_dir", output, "--workers", str(args.workers)]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return folder / output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", default="locuslab/TOFU", help="hub id or folder of TOFU")
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct; by default from the hub")
    parser.add_argument("--studies", nargs="+", default=sorted(path.stem for path in STUDIES.glob("*.yaml")))
    parser.add_argument("--objectives", nargs="+", default=["graddiff", "npo", "simnpo", "ga"])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work_dir", default="schedule-study")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "schedules")
    args = parser.parse_args()
    finished = []
    for name, objective in itertools.product(args.studies, args.objectives):
        settings = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
        if not any(grid["objective"] == [objective] for grid in settings["grid"]):
            continue
        seed = SEEDS.get(name, 0)
        bed = BEDS[name.split("-")[0]]
        folder = prepare(args, bed, seed)
        score(folder, bed, objective, "lora" if settings.get("use_peft") else "full")
        finished.append((name, objective, seed, study(args, folder, name, settings, objective)))
    from schedules_report import report

    report(finished, args.output, "python benchmarks/schedules.py " + " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()

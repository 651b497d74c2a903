"""How well each difficulty metric predicts what unlearning leaves behind, against its ceiling and trivial predictors.

    python benchmarks/difficulty.py --output benchmarks/results/difficulty                      # generated authors
    python benchmarks/difficulty.py --tofu locuslab/TOFU --output benchmarks/results/difficulty-tofu
    python benchmarks/difficulty.py --tofu locuslab/TOFU --model HuggingFaceTB/SmolLM2-135M-Instruct --epochs 4 \
        --forget_config forget05 --retain 400 --objectives graddiff npo --batch 8 --rate_scale 0.1 --output smollm2

For every model seed: a small Llama (or `--model`, for a night) learns the data by heart; every metric is computed on
it; every objective, full and LoRA, is calibrated with one seed (cross-fitted by author) and then run with other seeds
in studies (`evaluation.study`), uniformly, half of the forget set per step. Target: answer probability after
unlearning, mean over the snapshots at which the mean forget probability is 15-75% of its start, and over the seeds.
Every part is a cell that is kept in `--work_dir`: a killed run goes on there.
"""

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from evaluation.study.engine import Finished, check_finished, run_study
from evaluation.study.grid import Cell
from evaluation.study.options import StudyArguments
from evaluation.study.pool import Pool

OBJECTIVES = {  # learning rates: full, LoRA
    "ga": (1e-4, 1e-3),
    "graddiff": (5e-4, 2e-3),
    "npo": (6e-4, 3e-3),
    "simnpo": (6e-4, 3e-3),
}
PARTS = ("full", "lora")
SETS = ("forget", "retain", "retain_eval")
RETAIN_WEIGHT = 4.0
TRAINING_FREE = (
    "loss",
    "length",
    "self_confidence",
    "circuit_mass",
    "circuit_signature",
    "grad_norm",
    "grad_alignment",
    "mrd",
    "mrd_published",
    "noise_stability",
    "atypicality",
    "retain_similarity",
)
CALIBRATED = (
    "cud",
    "cud_top_k",
    "cud_log",
    "cud_edges",
    "cud_edges_outputs",
    "cud_edges_hidden",
    "cud_edges_gradients",
    "hidden_neighbours",
    "group_mean",
    "calibration",
)
MEASURED = {"cud": {"features": ["edges", "hidden", "gradients", "outputs"]}}  # edges were in the default then
VARIANTS = {
    "cud_log": {"variant": "log"},
    "cud_edges": {"features": ["edges"]},
    "cud_edges_outputs": {"features": ["edges", "outputs"]},
    "cud_edges_hidden": {"features": ["edges", "hidden"]},
    "cud_edges_gradients": {"features": ["edges", "gradients"]},
}


# What a world and its model depend on, and what scores do beside.
WORLD = ("tofu", "model", "forget_config", "batch", "forget", "retain", "epochs")
SCORES = (*WORLD, "passes", "rate_scale")


def data(args: argparse.Namespace, seed: int):
    """Forget, retain and retain evaluation samples with their author, and how often each is repeated in training."""
    from datasets import concatenate_datasets, load_dataset

    from evaluation.testbed import REPEATS, Testbed, build_testbed

    if not args.tofu:
        return build_testbed(seed)
    forget = load_dataset(args.tofu, args.forget_config, split="train").select(range(args.forget))
    retain = load_dataset(args.tofu, "retain90", split="train")
    retain = retain.select(range(len(retain) - args.retain, len(retain)))
    generator = np.random.default_rng(seed)
    parts = []
    for name, part in (("forget", forget), ("retain", retain)):
        # A pretrained model needs no help to know some samples better than others.
        vary = name == "forget" and not args.model
        repeats = generator.permutation(np.resize(REPEATS, len(part))) if vary else np.ones(len(part), int)
        parts.append(tofu_part(part, name, repeats))
    forget, retain = parts
    evaluated = retain.select(range(0, len(retain), 4))
    return Testbed(forget=forget, retain=retain, retain_eval=evaluated, train=concatenate_datasets([forget, retain]))


def tofu_part(part, name: str, repeats):
    """Samples of TOFU as a testbed has them: `repeats` says how often each is trained on in an epoch of memorising."""
    part = part.select_columns(["question", "answer"]).add_column("repeats", repeats.tolist())
    part = part.add_column("split", [name] * len(part))
    return part.add_column("author", [f"{name}-{row // 20}" for row in range(len(part))])


def untrained(testbed, seed: int, *, pretrained: str | None = None, tofu: bool = False):
    """The model before it has learned the data, and its tokenizer: a pretrained one, or a small Llama from nothing."""
    from evaluation.testbed import tiny_llama, train_tokenizer

    if pretrained:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(pretrained)
        tokenizer.chat_template = None  # a third of the tokens of a short question would be template
        return AutoModelForCausalLM.from_pretrained(pretrained, dtype="float32"), tokenizer
    if tofu:
        tokenizer = train_tokenizer(testbed.texts(), 3000)
        return tiny_llama(tokenizer, seed, layers=6, intermediate_size=336, max_positions=512), tokenizer
    tokenizer = train_tokenizer(testbed.texts())
    return tiny_llama(tokenizer, seed), tokenizer


def memorised(args: argparse.Namespace, testbed, seed: int, train=None):
    """A model that has learned the data (`train` instead of all of it) by heart, its tokenizer, its losses by epoch."""
    from evaluation.testbed import memorise

    model, tokenizer = untrained(testbed, seed, pretrained=args.model, tofu=bool(args.tofu))
    options = {"learning_rate": 5e-4, "batch_size": args.batch} if args.model else {}
    if train is not None:
        testbed = replace(testbed, train=train)
    trained = memorise(model, tokenizer, testbed, epochs=args.epochs, seed=seed, progress=False, **options)
    return model, tokenizer, trained.losses


def save_model(args: argparse.Namespace, testbed, seed: int, folder: Path) -> dict:
    """A model that knows the data by heart, in `folder`/model; how it learned."""
    model, tokenizer, losses = memorised(args, testbed, seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {"parameters": sum(p.numel() for p in model.parameters()), "losses": losses}


def save_data(testbed, folder: Path) -> None:
    """The data as `cud` reads it, in `folder`."""
    for name in SETS:
        if not (folder / f"{name}.jsonl").exists():
            getattr(testbed, name).to_json(folder / f"{name}.part")
            os.replace(folder / f"{name}.part", folder / f"{name}.jsonl")


def world_of(work_dir: Path, seed: int) -> Path:
    return work_dir / f"world-{seed}"


def make_world(work_dir: Path, cell: Cell) -> dict:
    """Work of a cell: data and model."""
    args, seed = argparse.Namespace(**cell.settings), cell.settings["model_seed"]
    testbed, folder = data(args, seed), world_of(work_dir, seed)
    save_data(testbed, folder)
    sizes = {name: len(getattr(testbed, name)) for name in SETS}
    return {"sizes": sizes, **save_model(args, testbed, seed, folder)}


def register_variants() -> None:
    """Make metrics of `VARIANTS`, and of MRD as published."""
    from cud_trainer.difficulty import METRICS, register_metric
    from cud_trainer.difficulty.cud import cud
    from cud_trainer.difficulty.metrics import mrd

    for name, variant in VARIANTS.items():
        if name not in METRICS:
            register_metric(name, needs_circuits=True, cross_fitted=True)(
                lambda context, variant=variant: cud(context, **variant)
            )
    if "mrd_published" not in METRICS:
        register_metric("mrd_published")(lambda context: mrd(context, relative=True))


def score(work_dir: Path, cell: Cell) -> dict:
    """Work of a cell: scores of all training-free metrics, or of all calibrated ones for a condition; CPU seconds of
    each kind of pass."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cud_trainer import score_difficulty

    register_variants()
    args, seed = argparse.Namespace(**cell.settings), cell.settings["model_seed"]
    folder = world_of(work_dir, seed) / "model"
    testbed = data(args, seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    options = dict(retain_dataset=testbed.retain, group_column="author", batch_size=args.batch, seed=0, progress=False)
    if cell.kind == "score":
        seconds = {}
        for name in TRAINING_FREE:  # each by itself, for its cost
            start = time.process_time()
            score_difficulty(model, testbed.forget, tokenizer, metrics=[name], **options)
            seconds[name] = time.process_time() - start
        scores = score_difficulty(model, testbed.forget, tokenizer, metrics=TRAINING_FREE, **options)
        start = time.process_time()
        epoch(model, tokenizer, testbed, args.batch)
        return {"columns": columns(scores), "cpu_seconds": seconds, "epoch_seconds": time.process_time() - start}
    start = time.process_time()
    calibration = calibration_of(args)
    scores = score_difficulty(
        model, testbed.forget, tokenizer, metrics=CALIBRATED, metric_args=MEASURED, calibration=calibration, **options
    )
    seconds = time.process_time() - start
    runs = scores.provenance["calibration"]["runs"]
    return {"columns": columns(scores), "cpu_seconds": seconds, "calibration": runs}


def calibration_of(args: argparse.Namespace):
    """How scores are calibrated for a condition, `args.objective` and `args.part`."""
    from peft import LoraConfig

    from cud_trainer.objectives import UnlearningLoss
    from cud_trainer.scoring.calibration import CalibrationSettings

    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if args.part == "lora" else None
    return CalibrationSettings(
        loss=UnlearningLoss(args.objective),
        retain_weight=RETAIN_WEIGHT,
        learning_rate=rate(args, args.objective, args.part),
        max_passes=args.passes,
        batch_size=min(50, args.batch + 10),
        seed=0,
        peft_config=adapter,
    )


def rate(args: argparse.Namespace, objective: str, part: str) -> float:
    return OBJECTIVES[objective][PARTS.index(part)] * args.rate_scale


def columns(scores) -> dict[str, list[float]]:
    return {name: scores[name].tolist() for name in scores.metrics}


def epoch(model, tokenizer, testbed, batch_size: int) -> None:
    """One pass of plain training over the forget set: the unit of cost."""
    import torch

    from cud_trainer.data import prepare_samples
    from cud_trainer.logprobs import score_answers

    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    prepared = prepare_samples(testbed.forget, tokenizer, name="forget")
    for _, batch in prepared.batches(batch_size):
        (-score_answers(model, batch).mean_logps).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def unlearn(args: argparse.Namespace, pool: Pool, seed: int, part: str) -> Finished:
    """A study of uniform runs; they end when less than 12% of the forget probability is left."""
    from trl import ModelConfig

    world = world_of(args.work_dir, seed)
    sizes = read(args, f"model-{seed}")["sizes"]
    half = sizes["forget"] // 2  # a step sees half of the forget set
    size = max(n for n in range(1, args.batch + 21) if half % n == 0)
    study = StudyArguments(
        forget_dataset=str(world / "forget.jsonl"),
        retain_dataset=str(world / "retain.jsonl"),
        utility_dataset=str(world / "retain_eval.jsonl"),
        retain_eval_samples=sizes["retain_eval"],
        output_dir=str(args.work_dir / f"runs-{seed}-{part}"),
        end_below=0.12,
        grid=[
            {
                "objective": [objective],
                "learning_rate": [rate(args, objective, part)],
                "seed": args.run_seeds,
            }
            for objective in args.objectives
        ],
        train={
            "retain_weight": RETAIN_WEIGHT,
            "preserve": False,
            "difficulty": "none",
            "schedule": "uniform",
            "passes": args.passes * 2,
            "max_length": 512,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 2,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": half // size,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
        },
    )
    lora = {"use_peft": True, "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
    return run_study(
        study, ModelConfig(model_name_or_path=str(world / "model"), **(lora if part == "lora" else {})), pool
    )


def cells(args: argparse.Namespace) -> tuple[list[Cell], list[Cell]]:
    """What is done before the runs: worlds with their models, then scores."""

    def cell(kind: str, names: tuple[str, ...], seed: int, **choices) -> Cell:
        choices = {"model_seed": seed, **choices}
        name = "-".join(map(str, (kind, *choices.values())))
        return Cell(kind, name, choices, {**{option: getattr(args, option) for option in names}, **choices})

    worlds = [cell("model", WORLD, seed) for seed in args.model_seeds]
    scores = [cell("score", SCORES, seed) for seed in args.model_seeds]
    scores += [
        cell("calibrate", SCORES, seed, objective=objective, part=part)
        for seed, objective, part in itertools.product(args.model_seeds, args.objectives, PARTS)
    ]
    return worlds, scores


def read(args: argparse.Namespace, name: str) -> dict | None:
    """What a cell came to, if it is finished."""
    path = args.work_dir / "cells" / name / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", help="hub id or folder of TOFU; by default generated authors")
    parser.add_argument("--model", help="pretrained model; by default a small Llama from scratch")
    parser.add_argument("--forget_config", default="forget10", help="of TOFU")
    parser.add_argument("--batch", type=int, default=40, help="samples in memory at a time (runs: up to 20 more)")
    parser.add_argument("--rate_scale", type=float, default=1.0, help="times the learning rates of unlearning")
    parser.add_argument("--forget", type=int, default=200, help="TOFU samples to forget")
    parser.add_argument("--retain", type=int, default=800, help="TOFU samples to retain")
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--model_seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--run_seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=20, help="of memorising")
    parser.add_argument("--passes", type=int, default=15, help="of calibration at most; runs have twice as many")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work_dir", type=Path, default=Path("difficulty-study"))
    parser.add_argument("--output", type=Path, default=Path("difficulty"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    worlds, scores = cells(args)
    check_finished(args.work_dir, [*worlds, *scores], overwrite=False)
    with Pool(args.workers) as pool:
        failed = pool.run(args.work_dir, worlds, make_world)
        seeds = [cell.choices["model_seed"] for cell in worlds if cell.name not in failed]
        failed |= pool.run(args.work_dir, [cell for cell in scores if cell.choices["model_seed"] in seeds], score)
        runs = {}
        for seed, part in itertools.product(seeds, PARTS):
            finished = unlearn(args, pool, seed, part)
            failed |= {f"{seed}, {part}, {name}": reason for name, reason in finished.failed.items()}
            for run in finished.runs():
                runs[seed, run.panel, part, run.seed] = run
    from difficulty_report import report

    report(args, runs, "python benchmarks/difficulty.py " + " ".join(sys.argv[1:]))
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

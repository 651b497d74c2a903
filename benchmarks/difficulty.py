"""How well each difficulty metric predicts what unlearning leaves behind, against its ceiling and trivial predictors.

    python benchmarks/difficulty.py --output benchmarks/results/difficulty                      # generated authors
    python benchmarks/difficulty.py --tofu locuslab/TOFU --output benchmarks/results/difficulty-tofu
    python benchmarks/difficulty.py --tofu locuslab/TOFU --model HuggingFaceTB/SmolLM2-135M-Instruct --epochs 4 \
        --forget_config forget05 --retain 400 --objectives graddiff npo --batch 8 --rate_scale 0.1 --output smollm2

For every model seed: a small Llama (or `--model`, for a night) learns the data by heart; every metric is computed on
it; every objective, full and LoRA, is calibrated with one seed (cross-fitted by author) and then run with other seeds
by `CUDTrainer`, uniformly, half of the forget set per step. Target: answer probability after unlearning, mean over the
snapshots at which the mean forget probability is 15-75% of its start, and over the seeds. Every part is kept in
`--work_dir`: a killed run goes on there.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

OBJECTIVES = {  # learning rates: full, LoRA
    "ga": (1e-4, 1e-3),
    "graddiff": (5e-4, 2e-3),
    "npo": (6e-4, 3e-3),
    "simnpo": (6e-4, 3e-3),
}
PARTS = ("full", "lora")
RETAIN_WEIGHT = 4.0
TRAINING_FREE = (
    "loss", "length", "self_confidence", "circuit_mass", "circuit_signature", "grad_norm", "grad_alignment", "mrd",
    "mrd_published", "noise_stability", "atypicality", "retain_similarity",
)  # fmt: skip
CALIBRATED = (
    "cud", "cud_paper", "cud_log", "cud_edges", "cud_edges_outputs", "cud_edges_hidden", "cud_edges_gradients",
    "hidden_neighbours", "group_mean", "calibration",
)  # fmt: skip
VARIANTS = {  # beside the default, which is fitted from edges, hidden states, gradient norms and outputs
    "cud_log": {"variant": "log"},
    "cud_edges": {"features": ["edges"]},
    "cud_edges_outputs": {"features": ["edges", "outputs"]},
    "cud_edges_hidden": {"features": ["edges", "hidden"]},
    "cud_edges_gradients": {"features": ["edges", "gradients"]},
}


@dataclass(frozen=True)
class Cell:
    """One piece of work: a model, its training-free scores, the scores calibrated for a condition, or a run."""

    kind: str
    model_seed: int
    objective: str = ""
    part: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        return "-".join(str(x) for x in (self.kind, self.model_seed, self.objective, self.part, self.seed) if x != "")


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
        part = part.select_columns(["question", "answer"])
        # A pretrained model needs no help to know some samples better than others.
        vary = name == "forget" and not args.model
        repeats = generator.permutation(np.resize(REPEATS, len(part))) if vary else np.ones(len(part), int)
        part = part.add_column("repeats", repeats.tolist()).add_column("split", [name] * len(part))
        parts.append(part.add_column("author", [f"{name}-{row // 20}" for row in range(len(part))]))
    forget, retain = parts
    evaluated = retain.select(range(0, len(retain), 4))
    return Testbed(forget=forget, retain=retain, retain_eval=evaluated, train=concatenate_datasets([forget, retain]))


def settings(args: argparse.Namespace, objective: str, part: str):
    """Learning rate, retain weight and adapter of a condition."""
    from peft import LoraConfig

    rate = OBJECTIVES[objective][PARTS.index(part)] * args.rate_scale
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if part == "lora" else None
    return rate, RETAIN_WEIGHT, adapter


def load(args: argparse.Namespace, seed: int):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(args.work_dir) / f"model-{seed}-0"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def untrained(args: argparse.Namespace, testbed, seed: int):
    """The model before it has learned the data, its tokenizer, and options of `memorise`."""
    from evaluation.testbed import tiny_llama, train_tokenizer

    if args.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.chat_template = None  # a third of the tokens of a short question would be template
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
        return model, tokenizer, {"learning_rate": 5e-4, "batch_size": args.batch}
    if args.tofu:
        tokenizer = train_tokenizer(testbed.texts(), 3000)
        return tiny_llama(tokenizer, seed, layers=6, intermediate_size=336, max_positions=512), tokenizer, {}
    tokenizer = train_tokenizer(testbed.texts())
    return tiny_llama(tokenizer, seed), tokenizer, {}


def memorised(args: argparse.Namespace, testbed, seed: int, train=None):
    """A model that has learned the data (`train` instead of all of it) by heart, its tokenizer, its losses by epoch."""
    from evaluation.testbed import memorise

    model, tokenizer, options = untrained(args, testbed, seed)
    if train is not None:
        testbed = replace(testbed, train=train)
    found = memorise(model, tokenizer, testbed, epochs=args.epochs, seed=seed, progress=False, **options)
    return model, tokenizer, found.losses


def make_model(args: argparse.Namespace, cell: Cell) -> dict:
    model, tokenizer, losses = memorised(args, data(args, cell.model_seed), cell.model_seed)
    folder = Path(args.work_dir) / cell.name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in model.parameters()), "losses": losses}


def score(args: argparse.Namespace, cell: Cell) -> dict:
    """Scores of all training-free metrics, or of all calibrated ones for a condition; seconds of each kind of pass."""
    from cud_trainer import score_difficulty
    from cud_trainer.difficulty import METRICS, register_metric
    from cud_trainer.difficulty.cud import cud
    from cud_trainer.difficulty.metrics import mrd
    from cud_trainer.objectives import UnlearningLoss
    from cud_trainer.scoring.calibration import CalibrationSettings

    for name, variant in VARIANTS.items():
        if name not in METRICS:
            register_metric(name, needs_circuits=True, cross_fitted=True)(
                lambda context, variant=variant: cud(context, **variant)
            )
    if "mrd_published" not in METRICS:
        register_metric("mrd_published")(lambda context: mrd(context, relative=True))
    testbed, (model, tokenizer) = data(args, cell.model_seed), load(args, cell.model_seed)
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
        return {"columns": columns(scores), "seconds": seconds, "epoch_seconds": time.process_time() - start}
    rate, weight, adapter = settings(args, cell.objective, cell.part)
    calibration = CalibrationSettings(
        loss=UnlearningLoss(cell.objective), retain_weight=weight, learning_rate=rate, max_passes=args.passes,
        batch_size=min(50, args.batch + 10), seed=0, peft_config=adapter,
    )  # fmt: skip
    start = time.process_time()
    scores = score_difficulty(model, testbed.forget, tokenizer, metrics=CALIBRATED, calibration=calibration, **options)
    seconds = time.process_time() - start
    return {"columns": columns(scores), "seconds": seconds, "calibration": scores.provenance["calibration"]["runs"]}


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


def unlearn(args: argparse.Namespace, cell: Cell) -> dict:
    """A uniform run by `CUDTrainer`; it ends when less than 12% of the forget probability is left."""
    import logging

    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils.logging import set_verbosity

    from cud_trainer import CUDConfig, CUDTrainer
    from cud_trainer.data import prepare_samples
    from evaluation.trajectory import TradeoffCallback

    set_verbosity(logging.ERROR)
    testbed, (model, tokenizer) = data(args, cell.model_seed), load(args, cell.model_seed)
    rate, weight, adapter = settings(args, cell.objective, cell.part)
    half = len(testbed.forget) // 2  # a step sees half of the forget set
    size = max(n for n in range(1, args.batch + 21) if half % n == 0)
    config = CUDConfig(
        output_dir=str(Path(args.work_dir) / "runs" / cell.name), objective=cell.objective, retain_weight=weight,
        difficulty="none", schedule="uniform", passes=args.passes * 2, learning_rate=rate, max_length=512,
        lr_scheduler_type="constant_with_warmup", warmup_steps=2, seed=cell.seed,
        per_device_train_batch_size=size, gradient_accumulation_steps=len(testbed.forget) // 2 // size,
        bf16=False, gradient_checkpointing=False, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, overwrite=True, dataloader_pin_memory=False,
    )  # fmt: skip
    path = TradeoffCallback(
        prepare_samples(testbed.forget, tokenizer, name="forget"),
        prepare_samples(testbed.retain_eval, tokenizer, name="retain_eval"),
    )

    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = path.path.forget[-1].mean() < 0.12 * path.path.forget[0].mean()

    trainer = CUDTrainer(
        model, config, forget_dataset=testbed.forget, retain_dataset=testbed.retain, processing_class=tokenizer,
        peft_config=adapter, callbacks=[path, Enough()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    return {
        "forget": [snapshot.tolist() for snapshot in path.path.forget],
        "retain": path.path.retain,
        "seconds": time.process_time() - start,
    }


WORK = {"model": make_model, "score": score, "calibrate": score, "run": unlearn}


def do(args: argparse.Namespace, cell: Cell) -> str:
    import torch

    torch.set_num_threads(1)
    path = Path(args.work_dir) / f"{cell.name}.json"
    if not path.exists():
        start = time.time()
        result = WORK[cell.kind](args, cell)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(result))
        os.replace(temporary, path)
        return f"{cell.name}: {time.time() - start:.0f} s"
    return f"{cell.name}: kept"


def cells(args: argparse.Namespace) -> list[list[Cell]]:
    """Work in order; what stands in one list can be done at the same time."""
    rounds = [[Cell("model", seed) for seed in args.model_seeds]]
    for seed in args.model_seeds:
        conditions = list(itertools.product(args.objectives, PARTS))
        rounds.append(
            [Cell("score", seed)]
            + [
                cell
                for objective, part in conditions
                for cell in (
                    Cell("calibrate", seed, objective, part),
                    *(Cell("run", seed, objective, part, number) for number in args.run_seeds),
                )
            ]
        )
    return rounds


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
    parser.add_argument("--work_dir", default="difficulty-study")
    parser.add_argument("--output", type=Path, default=Path("difficulty"))
    args = parser.parse_args()
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for group in cells(args):
            for line in [pool.submit(do, args, cell) for cell in group]:
                print(line.result(), flush=True)
    from difficulty_report import report

    command = "python benchmarks/difficulty.py " + " ".join(sys.argv[1:])
    report(args, command)


if __name__ == "__main__":
    main()

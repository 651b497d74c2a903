"""The pieces of work of part `decisive`, each in a process that shares the GPU with others: memorise, score, unlearn.

Every function takes plain values and returns plain values, so that it can be sent to a process.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity

from cud_trainer import CUDConfig, CUDTrainer, DifficultyScores, score_difficulty
from cud_trainer.data import Samples
from cud_trainer.files import write_json
from cud_trainer.logprobs import answer_probability
from cud_trainer.models.fingerprint import model_fingerprint
from cud_trainer.objectives import UnlearningLoss
from cud_trainer.scoring.calibration import CalibrationSettings
from cud_trainer.trainer import DivergenceError
from evaluation.endpoint import endpoint, worst_quarter
from evaluation.testbed import Testbed, memorise

from .record import failure, free
from .setting import Setting

MEMORISED, NEVER_SEEN = "memorised", "never-seen"
SCORES = "scores.parquet"
HERE: dict[str, Any] = {}  # of a process


@dataclass(frozen=True)
class Plan:
    """What all runs of a part have in common.

    Attributes:
        epochs, memorise_batch, memorise_rate: how the model learns forget, retain and held-out samples by heart.
        learning_rate: of unlearning with LoRA of rank 16 (alpha 16, all linear layers), constant after 2 steps.
        pairs, accumulation: a step has `pairs * accumulation` pairs.
        steps: optimizer steps of a run; every: those between two snapshots.
    """

    epochs: int = 6
    memorise_batch: int = 16
    memorise_rate: float = 5e-4
    learning_rate: float = 2e-3
    pairs: int = 25
    accumulation: int = 2
    steps: int = 120
    every: int = 5
    eval_batch: int = 100

    @classmethod
    def tiny(cls) -> Plan:
        return cls(
            epochs=20,
            memorise_batch=12,
            memorise_rate=4e-3,
            learning_rate=3e-2,
            pairs=6,
            accumulation=2,
            steps=4,
            every=2,
            eval_batch=24,
        )


@dataclass(frozen=True)
class Job:
    """An unlearning run.

    Attributes:
        arm: its name.
        options: of `CUDConfig`, what makes the arm.
        weight: of the retain loss.
        seed: of order, partners, the adapter's start and a random difficulty.
    """

    arm: str
    options: dict[str, Any]
    weight: float
    seed: int

    @property
    def key(self) -> str:
        return f"run {self.arm} weight {self.weight:g} seed {self.seed}"


def adapter() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def start(setting: Setting, plan: Plan, threads: int) -> None:
    """What a process does first: its data and tokenizer are read once."""
    torch.set_num_threads(threads)
    set_verbosity(logging.ERROR)
    disable_progress_bar()
    warnings.simplefilter("ignore")
    HERE["setting"], HERE["plan"] = setting, plan


def work(name: str, *arguments: Any) -> dict[str, Any]:
    """Do one of `learn`, `score` and `unlearn` in a process that was started; what goes wrong is a figure, too."""
    try:
        return {"learn": learn, "score": score, "unlearn": unlearn}[name](HERE["setting"], HERE["plan"], *arguments)
    except Exception as error:
        return failure(error)
    finally:
        free()


def learn(setting: Setting, plan: Plan, name: str) -> dict[str, Any]:
    """Teach the text model forget, retain and held-out samples (`memorised`), or all but the forget samples
    (`never-seen`), and save it in the work folder; what is there already is kept."""
    began, folder = time.monotonic(), setting.work / name
    samples = setting.samples
    if not (folder / "learned.json").exists():
        parts = [samples.forget, samples.retain, samples.held_out][0 if name == MEMORISED else 1 :]
        train = concatenate_datasets(parts)
        train = train.add_column("repeats", [1] * len(train))  # type: ignore[call-arg]
        model = setting.text_model().requires_grad_(True).to(setting.device)
        done = memorise(
            model,
            setting.tokenizer,
            Testbed(samples.forget, samples.retain, samples.held_out, train),
            epochs=plan.epochs,
            learning_rate=plan.memorise_rate,
            batch_size=plan.memorise_batch,
            progress=False,
        )
        model.save_pretrained(folder)
        setting.tokenizer.save_pretrained(folder)
        write_json(folder / "learned.json", {"losses": done.losses})
    model = load(folder, setting)
    found: dict[str, Any] = {"model": model_fingerprint(model), **json.loads((folder / "learned.json").read_text())}
    for part in ("forget", "retain", "held_out"):
        values = probability(model, setting, setting.prepared(getattr(samples, part)), plan)
        found[part] = {"mean": values.mean(), "lowest": values.min(), "worst_quarter": worst_quarter(values)}
        if part == "forget":
            found["forget_probability"] = values.tolist()
    return {**found, "seconds": time.monotonic() - began}


def load(folder: Path, setting: Setting) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(setting.device)


def probability(model: Any, setting: Setting, prepared: Samples, plan: Plan) -> np.ndarray:
    device = setting.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return answer_probability(model, prepared, batch_size=plan.eval_batch)


def score(setting: Setting, plan: Plan, weight: float, seed: int) -> dict[str, Any]:
    """CUD of every forget sample, cross-fitted by author, with one calibration run; saved in the work folder."""
    began = time.monotonic()
    model = load(setting.work / MEMORISED, setting)
    passes = plan.steps * plan.pairs * plan.accumulation / len(setting.samples.forget)
    calibration = CalibrationSettings(
        loss=UnlearningLoss("graddiff"),
        retain_weight=weight,
        learning_rate=plan.learning_rate,
        seed=seed,
        max_passes=max(1, round(0.75 * passes)),
        batch_size=plan.pairs,
        peft_config=adapter(),
        autocast=torch.bfloat16 if setting.device.type == "cuda" else None,
    )
    scores = score_difficulty(
        model,
        setting.samples.forget,
        tokenizer(setting),
        metrics=("cud",),
        retain_dataset=setting.samples.retain,
        calibration=calibration,
        group_column="author",
        max_length=512,
        seed=seed,
        progress=False,
    )
    scores.save(setting.work / SCORES, overwrite=True)
    return {
        "model": model_fingerprint(model),
        "cud": scores["cud"].tolist(),
        "seconds": time.monotonic() - began,
        "calibration": scores.provenance["calibration"]["runs"],
    }


def tokenizer(setting: Setting) -> Any:
    return AutoTokenizer.from_pretrained(setting.work / MEMORISED)


class Watch(TrainerCallback):
    """Answer probabilities of forget and held-out samples, before training and every few steps."""

    def __init__(self, setting: Setting, plan: Plan, forget: Dataset, held_out: Dataset) -> None:
        self.setting, self.plan, self.sets = setting, plan, (forget, held_out)
        self.steps: list[int] = []
        self.forget: list[np.ndarray] = []
        self.held_out: list[np.ndarray] = []
        self.seconds = 0.0

    def _look(self, model: Any, step: int) -> None:
        began = time.monotonic()
        self.steps.append(step)
        for values, dataset in zip((self.forget, self.held_out), self.sets, strict=True):
            values.append(probability(model, self.setting, dataset, self.plan))
        self.seconds += time.monotonic() - began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.plan.every == 0 or state.global_step >= state.max_steps:
            self._look(kwargs["model"], state.global_step)


def difficulty(setting: Setting, job: Job, forget: Dataset) -> DifficultyScores | None:
    """CUD as scored, or a random one under the name that the arm gives; `None` for an arm that needs none."""
    name = job.options["difficulty"]
    if name == "cud":
        return DifficultyScores.load(setting.work / SCORES)
    if name == "given":
        values = np.random.default_rng(job.seed).random(len(forget))
        return DifficultyScores(list(forget["sample_id"]), {"random": values})
    return None


def unlearn(setting: Setting, plan: Plan, job: Job, never_seen: list[float] | None) -> dict[str, Any]:
    """One run: its endpoint, and by snapshot the mean and worst quarter of forget, held-out by author."""
    began, samples = time.monotonic(), setting.samples
    words = tokenizer(setting)
    model = load(setting.work / MEMORISED, setting)
    fingerprint = model_fingerprint(model)
    forget, held_out = setting.prepared(samples.forget), setting.prepared(samples.held_out, name="held-out")
    watch = Watch(setting, plan, forget, held_out)
    folder = setting.work / "runs" / job.key.replace(" ", "-")
    step_pairs = plan.pairs * plan.accumulation
    config = CUDConfig(
        str(folder),
        objective="graddiff",
        retain_weight=job.weight,
        seed=job.seed,
        learning_rate=plan.learning_rate,
        passes=-(-plan.steps * step_pairs // len(forget)),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.pairs,
        gradient_accumulation_steps=plan.accumulation,
        max_length=512,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        overwrite=True,
        use_cpu=setting.device.type == "cpu",
        bf16=setting.device.type == "cuda",
        **{"preserve": False, **job.options},
    )
    trainer = CUDTrainer(
        model,
        config,
        forget_dataset=samples.forget,
        retain_dataset=samples.retain,
        processing_class=words,
        peft_config=adapter(),
        difficulty_scores=difficulty(setting, job, forget),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trained, diverged = time.monotonic(), None
    try:
        trainer.train()
    except DivergenceError as error:  # the snapshots up to there are a result
        diverged = str(error)
    trained = time.monotonic() - trained - watch.seconds
    shutil.rmtree(folder, ignore_errors=True)
    finite = [np.isfinite(a).all() and np.isfinite(b).all() for a, b in zip(watch.forget, watch.held_out, strict=True)]
    steps = [step for step, good in zip(watch.steps, finite, strict=True) if good]
    left, kept = np.array(watch.forget)[finite], np.array(watch.held_out)[finite]
    authors = np.array(samples.held_out["author"])
    names = list(dict.fromkeys(authors.tolist()))
    end = endpoint(left, kept, None if never_seen is None else np.array(never_seen))
    shown = end.snapshot if end.snapshot is not None else len(left) - 1
    return {
        "arm": job.arm,
        "weight": job.weight,
        "seed": job.seed,
        "model": fingerprint,
        **asdict(end),
        "step": None if end.snapshot is None else steps[end.snapshot],
        "diverged": diverged,
        "seconds": time.monotonic() - began,
        "training_seconds": trained,
        "snapshot_seconds": watch.seconds,
        "steps": steps,
        "mean": left.mean(1).tolist(),
        "worst": worst_quarter(left).tolist(),
        "held_out": kept.mean(1).tolist(),
        "held_out_by_author": [[row[authors == name].mean() for name in names] for row in kept],
        "forget_at_endpoint": left[shown].tolist(),
    }

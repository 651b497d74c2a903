"""What a step of `CUDTrainer` costs beside the same loss in a bare loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from cud_trainer import CUDConfig, CUDTrainer, DifficultyScores
from cud_trainer.data import PairedCollator, Samples
from cud_trainer.logprobs import score_answers
from cud_trainer.models.head import LOGITS_BYTES
from cud_trainer.objectives import UnlearningLoss

from .clock import Work, compare, peak_gib, ratio, synchronize
from .record import free
from .setting import Setting

LEARNING_RATE = 1e-6
RETAIN_WEIGHT = 1.0
# The stop must not empty the batch: a random model knows nothing.
ON = {"difficulty": "given", "schedule_args": {"per_sample_stop": {"target": 1e-12}}}
OFF = {"difficulty": "none", "schedule": "uniform"}
BARE, DIFFICULTY_OFF, DIFFICULTY_ON = "bare loop", "difficulty off", "default schedule by difficulty"


class Clock(TrainerCallback):
    """Seconds from the end of a step to the end of the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, [0.0]
        self.ends.clear()

    def tick(self) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tick()

    @property
    def step(self) -> float:
        """The median; the first two steps warm up."""
        return statistics.median(b - a for a, b in zip(self.ends[1:-1], self.ends[2:], strict=True))


def tokenised(count: int, tokens: int, vocabulary: int, seed: int, name: str) -> Dataset:
    """Random samples of one length, the second half of which is the answer, as a prepared dataset."""
    ids = np.random.default_rng(seed).integers(2, vocabulary, (count, tokens))
    labels = np.where(np.arange(tokens) < tokens // 2, -100, ids)
    names = [f"{name}{row}" for row in range(count)]
    return Dataset.from_dict({"sample_id": names, "input_ids": ids.tolist(), "labels": labels.tolist()})


def bare_loop(model: Any, batches: list[dict[str, torch.Tensor]], clock: Clock, bf16: bool) -> None:
    """GradDiff at its cheapest: one forward pass of forget and retain samples, answer positions only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    model.train()
    for batch in batches:
        batch = {key: value.to(clock.device) for key, value in batch.items()}
        with torch.autocast(clock.device.type, torch.bfloat16) if bf16 else nullcontext():
            scores = score_answers(model, batch)
            pairs = len(batch["forget_index"])
            loss = scores.mean_logps[:pairs].mean() - RETAIN_WEIGHT * scores.mean_logps[pairs:].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()


def our_run(setting: Setting, model: Any, data: list[Dataset], pairs: int, options: dict, clock: Clock) -> None:
    forget, retain = data
    steps = len(forget) // pairs
    scores = None
    if options["difficulty"] == "given":
        scores = DifficultyScores(list(forget["sample_id"]), {"random": np.random.default_rng(0).random(len(forget))})
    with tempfile.TemporaryDirectory() as folder:
        config = CUDConfig(
            f"{folder}/run",
            objective="graddiff",
            preserve=False,
            retain_weight=RETAIN_WEIGHT,
            passes=1,
            max_steps=steps,
            per_device_train_batch_size=pairs,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            seed=0,
            use_cpu=setting.device.type == "cpu",
            bf16=setting.device.type == "cuda",
            **options,
        )
        trainer = CUDTrainer(
            model,
            config,
            forget_dataset=forget,
            retain_dataset=retain,
            processing_class=setting.tokenizer,
            difficulty_scores=scores,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        # Mixed precision wraps the model's forward pass; the bare loop must not go through that.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def training(setting: Setting, name: str, *, lora: bool) -> dict[str, Any]:
    """Seconds of a step, tokens per second and peak memory above the weights: bare, difficulty off and on, in turn.

    All weights in float32 under bfloat16 autocast, or a LoRA adapter of rank 16 on frozen bfloat16 weights.
    """
    device = setting.device
    bf16 = device.type == "cuda"
    pairs, tokens, steps, rounds = (2, 12, 4, 1) if setting.tiny else (8, 128, 10, 2)
    model: Any = setting.model(name, torch.bfloat16 if lora and bf16 else torch.float32)
    setting.forget_models()  # it is trained: nobody else gets it
    if lora:
        config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    else:
        model.requires_grad_(True)
    words = len(setting.tokenizer)
    data = [tokenised(steps * pairs, tokens, words, seed, part) for seed, part in enumerate("fr")]
    pad = int(setting.tokenizer.pad_token_id)  # type: ignore[arg-type]
    collate = PairedCollator(*(Samples(part, pad) for part in data))
    same = {"weight": 1.0, "retain_scale": 1.0}
    rows = [{"row": i, "forget_index": i, "retain_index": i, **same} for i in range(len(data[0]))]
    batches = [collate(rows[start : start + pairs]) for start in range(0, len(rows), pairs)]
    variants: dict[str, Callable[[Clock], None]] = {
        BARE: lambda clock: bare_loop(model, batches, clock, bf16),
        DIFFICULTY_OFF: lambda clock: our_run(setting, model, data, pairs, OFF, clock),
        DIFFICULTY_ON: lambda clock: our_run(setting, model, data, pairs, ON, clock),
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    peaks: dict[str, float | None] = {}
    for number in range(rounds):
        for variant in list(variants)[:: 1 if number % 2 == 0 else -1]:
            clock = Clock(device)
            peaks[variant] = peak_gib(lambda v=variant, c=clock: variants[v](c), device)  # type: ignore[misc]
            seconds[variant].append(clock.step)
            model.zero_grad()
            free()
    return {
        "pairs": pairs,
        "tokens": tokens,
        "steps": steps,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "variants": {
            variant: {
                "seconds": statistics.median(found),
                "ratio": ratio(found, seconds[BARE]),
                "peak_gib": peaks[variant],
                "tokens_per_second": 2 * pairs * tokens / statistics.median(found),
            }
            for variant, found in seconds.items()
        },
    }


def logits(setting: Setting, name: str) -> dict[str, Any]:
    """Seconds and peak memory above the weights of a loss and its gradients: all logits at once, and some at a time.

    All weights in bfloat16. NLL reads answers, KL distributions.
    """
    device = setting.device
    pairs, tokens = (2, 12) if setting.tiny else (8, 512)
    model: Any = setting.model(name)
    setting.forget_models()
    model.train().requires_grad_(True)
    words = len(setting.tokenizer)
    forget, retain = (Samples(tokenised(pairs, tokens, words, seed, part), 0) for seed, part in enumerate("fr"))
    rows = [dict.fromkeys(("row", "forget_index", "retain_index"), row) for row in range(pairs)]
    rows = [{**row, "weight": 1.0, "retain_scale": 1.0} for row in rows]  # type: ignore[dict-item]
    batch = {key: value.to(device) for key, value in PairedCollator(forget, retain)(rows).items()}
    vocabulary = model.config.vocab_size
    sizes = {"all": 0, "some": 12 * 2 * vocabulary if setting.tiny else LOGITS_BYTES}
    found: dict[str, Any] = {"pairs": pairs, "tokens": tokens, "vocabulary": vocabulary}
    for retain_loss in ("nll", "kl"):
        losses = {key: UnlearningLoss("graddiff", {}, retain_loss, logits_bytes=size) for key, size in sizes.items()}
        reference = losses["some"].reference(model, forget, retain, batch_size=pairs, device=device)

        def work(loss: UnlearningLoss, reference: Any = reference) -> None:
            terms = loss(model, batch, reference)
            assert terms.retain is not None
            (terms.forget.mean() + terms.retain.mean()).backward()
            model.zero_grad()

        works: dict[str, Work] = {key: partial(work, loss) for key, loss in losses.items()}
        peaks = {key: peak_gib(one, device) for key, one in works.items()}
        times = compare(works, device, 1 if setting.tiny else 4)
        found[retain_loss] = {"peak_gib": peaks, "seconds": {key: statistics.median(t) for key, t in times.items()}}
        found[retain_loss]["ratio"] = ratio(times["some"], times["all"])
    return found

"""What a step of CUDTrainer costs beside the same objective in a bare `Trainer.compute_loss`, as ratios in one run.

    python benchmarks/step.py --output benchmarks/results/step.json

Bare trainers get the same batches and the same one forward pass (only answer positions go through the vocabulary).
Each variant trains for `--steps` steps in turn, `--repeats` times; the figure is CPU time from the end of a step to the
end of the next, over the bare trainer's of the same repeat: median, lowest and highest of the repeats.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution import machine
from datasets import Dataset
from timing import said, small_llama, spread
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from cud_trainer import CUDConfig, CUDTrainer, score_difficulty
from cud_trainer.data import PairedCollator, prepare_samples
from cud_trainer.files import write_json
from cud_trainer.logprobs import score_answers
from cud_trainer.schedule import make_schedule
from evaluation.testbed import build_testbed, train_tokenizer

BATCH = 8


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.process_time())

    @property
    def step(self) -> float:
        """Median seconds of a step; the first two warm up."""
        return float(np.median(np.diff(self.ends)[1:]))


class Bare(Trainer):
    """GradDiff, or NPO with a second model, at its cheapest: one forward pass, answer positions only."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, reference: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reference_model = reference

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pairs = len(inputs["forget_index"])
        scores = score_answers(model, inputs)
        if self.reference_model is None:
            forget = scores.mean_logps[:pairs]
        else:
            with torch.no_grad():
                before = score_answers(self.reference_model, {key: value[:pairs] for key, value in inputs.items()})
            forget = -20 * torch.nn.functional.logsigmoid(-0.1 * (scores.logps[:pairs] - before.logps))
        return forget.mean() - scores.mean_logps[pairs:].mean()


class Usual(Bare):
    """The same NPO as published codes write it: forget and retain set one after the other, logits of all positions."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pairs = len(inputs["forget_index"])

        def nll(network, part):
            batch = {key: inputs[key][part] for key in ("input_ids", "attention_mask", "labels")}
            logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:]
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none"
            )
            return losses.sum(1), (labels != -100).sum(1)

        forget, retain = slice(0, pairs), slice(pairs, 2 * pairs)
        with torch.no_grad():
            before, _ = nll(self.reference_model, forget)
        now, _ = nll(model, forget)
        kept, tokens = nll(model, retain)
        loss = -20 * torch.nn.functional.logsigmoid(0.1 * (now - before))
        return loss.mean() + (kept / tokens).mean()


def settings(folder: str, steps: int) -> dict[str, Any]:
    return dict(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-5,
        max_steps=steps,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--output", type=Path, default=Path("step.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = build_testbed(seed=0)
    tokenizer = train_tokenizer(world.texts())
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = small_llama(args, vocab_size=16384, **ends)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    second = LlamaForCausalLM(model.config).eval()
    forget, retain = (prepare_samples(part, tokenizer) for part in (world.forget, world.retain))
    passes = -(-args.steps * BATCH // len(forget))
    scores = score_difficulty(model, world.forget, tokenizer, metrics=["loss", "length"], progress=False)
    ids = [list(part["sample_id"]) for part in (forget, retain)]
    rows = make_schedule("uniform", ids[0], retain_ids=ids[1], passes=passes, seed=0).rows(*ids, BATCH)

    def run(make: Any) -> float:
        model.load_state_dict(start)
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(f"{folder}/out")
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(clock)
            trainer.train()
        return clock.step

    def bare(folder: str, reference: Any = None, kind: type = Bare) -> Trainer:
        return kind(
            model,
            TrainingArguments(**settings(folder, args.steps), train_sampling_strategy="sequential"),
            train_dataset=Dataset.from_dict(rows),
            data_collator=PairedCollator(forget, retain),
            reference=reference,
        )

    def ours(folder: str, difficulty: Any = None, **options: Any) -> CUDTrainer:
        config = CUDConfig(
            **settings(folder, args.steps),
            passes=passes,
            bf16=False,
            preserve=False,
            **{"difficulty": "loss" if difficulty is not None else "none", "schedule": "uniform", **options},
        )
        return CUDTrainer(
            model,
            config,
            forget_dataset=forget,
            retain_dataset=retain,
            processing_class=tokenizer,
            difficulty_scores=difficulty,
        )

    weights, stop = {"schedule": "upweight_hard"}, {"schedule": "upweight_hard+per_sample_stop"}
    variants = {
        "bare GradDiff": bare,
        "GradDiff, difficulty off": lambda folder: ours(folder, objective="graddiff"),
        "GradDiff, weights by difficulty": lambda folder: ours(folder, scores, objective="graddiff", **weights),
        "GradDiff, weights and per-sample stop": lambda folder: ours(folder, scores, objective="graddiff", **stop),
        "bare NPO with a reference model": lambda folder: bare(folder, second),
        "NPO with a reference model as published codes write it": lambda folder: bare(folder, second, Usual),
        "NPO, weights by difficulty": lambda folder: ours(folder, scores, objective="npo", **weights),
    }
    base = {name: list(variants)[0 if "GradDiff" in name else 4] for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(args.repeats):
        # the other way round every second time, so that a drift of the machine does not favour anyone
        for name in list(variants)[:: 1 if repeat % 2 == 0 else -1]:
            model.train()
            seconds[name].append(run(variants[name]))
            print(f"{name}: {seconds[name][-1]:.3f} s", flush=True)
    table = []
    usual = list(variants)[5]
    for name, other in [*base.items(), (list(variants)[-1], usual)]:
        ratios = spread(np.array(seconds[name]) / np.array(seconds[other]))
        table.append({"step": name, "seconds": float(np.median(seconds[name])), "against": other, **ratios})
        print(f"{name}: {said(ratios)} of {other}")
    result = {
        "command": "python benchmarks/step.py",
        "settings": {key: str(value) for key, value in vars(args).items() if key != "output"} | {"batch": BATCH},
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(),
        "table": table,
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()

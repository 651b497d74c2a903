"""Runs of `CUDTrainer` on a tiny model, in this process or in others, as torchrun starts them."""

import json
from pathlib import Path

import processes as started
from builders import SUPPORT, make_model, make_tokenizer, qa_dataset

from cud_trainer import CUDConfig, CUDTrainer


def config(output, **options) -> CUDConfig:
    settings = {
        "preserve": False,
        "difficulty": "loss",
        "schedule": "easy_to_hard",
        "passes": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return CUDConfig(output_dir=str(output), **{**settings, **options})


def make_trainer(output, model=None, forget=None, retain=None, tokenizer=None, **options) -> CUDTrainer:
    own = ("peft_config", "difficulty_scores", "eval_dataset", "heldout_dataset")
    extra = {key: options.pop(key) for key in own if key in options}
    return CUDTrainer(
        make_model(0).double() if model is None else model,
        config(output, **options),
        forget_dataset=qa_dataset(9) if forget is None else forget,
        retain_dataset=qa_dataset(7, 100) if retain is None else retain,
        processing_class=tokenizer or make_tokenizer(),
        **extra,
    )


def checksum(model) -> float:
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def torchrun(output, result, *checkpoint, processes=2, killed=False, **options) -> dict:
    """What `ddp_worker` writes down; `killed` expects it to die."""
    options = {"processes": processes, **options}
    arguments = [output, result, json.dumps(options), *checkpoint]
    for attempt in range(2):
        done = started.run(SUPPORT / "ddp_worker.py", *arguments, processes=processes)
        if killed:
            assert done.returncode != 0 and not Path(result).exists(), done.stdout + done.stderr
            return {}
        # An abort without an exception comes from a thread of the library, not from the run: see ddp_worker.
        if attempt or "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(Path(result).read_text())

"""How far runs that are split over processes come out apart from plain ones, and what makes the difference.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/sharded.py --output benchmarks/results/sharded.json

One model (random weights, seed 0), one plan, NPO with the KL retain loss, AdamW; every row changes one thing. Figures
are beside plain DDP in float32: the largest relative difference of a step's loss, and the mean difference of a forget
sample's answer log-probability after the run (nats a token). On a CPU, over gloo; needs the package deepspeed.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from attribution import machine
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import cud_trainer.trainer
from cud_trainer import CUDConfig, CUDTrainer
from cud_trainer.files import write_json
from evaluation.testbed import build_testbed, train_tokenizer

PLAIN: dict[str, Any] = {
    "objective": "npo",
    "retain_loss": "kl",
    "preserve": False,
    "difficulty": "loss",
    "schedule": "hard_to_easy+upweight_hard",
    "passes": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "bf16": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "ddp_find_unused_parameters": False,
    "overwrite": True,
}
ROWS: dict[str, dict[str, Any]] = {
    "DDP, float32": {},
    "DDP, accumulated twice": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "ZeRO-1, float32": {"zero": 1},
    "ZeRO-2, float32": {"zero": 2},
    "ZeRO-3, float32": {"zero": 3},
    "ZeRO-2, accumulated twice": {"zero": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "ZeRO-2, no gradient clipping": {"zero": 2, "max_grad_norm": 0.0},
    "DDP, no gradient clipping": {"max_grad_norm": 0.0},
    "DDP, bf16": {"bf16": True},
    "ZeRO-2, bf16": {"zero": 2, "bf16": True},
    "ZeRO-3, bf16": {"zero": 3, "bf16": True},
    "ZeRO-2, bf16, reference of the weights before rounding": {"zero": 2, "bf16": True, "before_rounding": True},
}


def zero(stage: int) -> dict[str, Any]:
    whole = {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    return {
        "zero_optimization": {"stage": stage, **(whole if stage == 3 else {})},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
    }


def run(folder: Path, row: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    options = {**PLAIN, **row}
    stage, before_rounding = options.pop("zero", None), options.pop("before_rounding", False)
    if stage is not None:
        options["deepspeed"] = zero(stage)
    cast = cud_trainer.trainer.as_deepspeed_trains
    if before_rounding:
        cud_trainer.trainer.as_deepspeed_trains = lambda model, settings: None  # type: ignore[assignment]
    torch.manual_seed(0)
    tokenizer = data["processing_class"]
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    try:
        trainer = CUDTrainer(LlamaForCausalLM(shape), CUDConfig(output_dir=str(folder), **options), **data)
    finally:
        cud_trainer.trainer.as_deepspeed_trains = cast
    trainer.train()
    log = trainer.state.log_history
    return {
        "served": trainer.served_ids,
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "kl_at_start": next(entry["retain_loss"] for entry in log if "retain_loss" in entry),
        "log_probability": np.log(trainer.predict().predictions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled, for minutes
    testbed = build_testbed(seed=0)
    data = {
        "forget_dataset": Dataset.from_list([dict(row) for row in testbed.forget][:32]),
        "retain_dataset": Dataset.from_list([dict(row) for row in testbed.retain][:32]),
        "processing_class": train_tokenizer(testbed.texts()),
    }
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, row in ROWS.items():
            rows[name] = run(Path(folder), dict(row), data)
    plain = rows["DDP, float32"]
    found = [
        {
            "run": name,
            "same_order": row["served"] == plain["served"],
            "loss": float(np.max(np.abs(np.divide(row["losses"], plain["losses"]) - 1))),
            "log_probability": float(np.abs(row["log_probability"] - plain["log_probability"]).mean()),
            "kl_at_start": row["kl_at_start"],
        }
        for name, row in rows.items()
    ]
    if os.environ["RANK"] == "0":
        versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
        write_json(output, {"machine": machine(), "processes": 2, **versions, "rows": found})
        for line in found:
            print(line)
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()

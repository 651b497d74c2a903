"""Run by test_sharded: trains on two processes, one run after the other, each split in its own way.

Usage: sharded_worker.py FOLDER RESULT.json RUNS.json

`RUNS.json` is a list of runs: `{"name": ..., "how": "ddp" | "zero1" | "zero2" | "zero3" | "zero3 launched" | "fsdp2",
options of the run}`; `resume` names the run whose first checkpoint this one goes on from, `lora` trains an adapter,
`path` loads the model from there. One start serves all of them. Plain runs come before those of FSDP.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from builders import make_model, make_tokenizer, qa_dataset
from peft import LoraConfig
from runs import config

from cud_trainer import CUDTrainer

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
# Buckets of the size of this model: else stage 3 keeps every tensor of it whole.
SMALL = {
    "stage3_gather_16bit_weights_on_model_save": True,
    "stage3_param_persistence_threshold": 0,
    "reduce_bucket_size": 2000,
    "stage3_prefetch_bucket_size": 2000,
}


def zero_config(stage: int, **zero) -> dict:
    return {
        "zero_optimization": {"stage": stage, **(SMALL if stage == 3 else {}), **zero},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
    }


def shard_on_cpu() -> None:
    """FSDP on gloo: accelerate shards on accelerators only, so it is told that it may."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *args, **options):
        original(self, *args, **options)
        self._shared_state["distributed_type"] = DistributedType.FSDP
        if options.get("fsdp_plugin") is not None:
            self._shared_state["fsdp_plugin"] = options["fsdp_plugin"]

    AcceleratorState.__init__ = init


def forget_how() -> None:
    """The next run may be split in another way."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def train(folder: Path, run: dict) -> dict:
    name, how, resume, lora, path = (run.pop(key, None) for key in ("name", "how", "resume", "lora", "path"))
    output = folder / (resume or name)
    options = {"ddp_find_unused_parameters": False, "gradient_checkpointing": False, "overwrite": not resume, **run}
    if how == "zero3 launched":  # what `accelerate launch` makes of recipes/accelerate/deepspeed_zero3.yaml
        os.environ |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
            "ACCELERATE_MIXED_PRECISION": "bf16" if run.get("bf16") else "no",
        }
    elif how.startswith("zero"):
        options["deepspeed"] = zero_config(int(how[-1]))
    elif how == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": dict(FSDP)}
    args = config(output, **options)
    trainer = CUDTrainer(
        path or make_model(0),
        args,
        forget_dataset=qa_dataset(9),
        retain_dataset=qa_dataset(7, 100),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-1") if resume else None)
    found = {
        "type": str(trainer.accelerator.distributed_type).rpartition(".")[2],
        "served": trainer.served_ids,
        "planned": trainer.schedule.order.tolist(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "retain_losses": [entry["retain_loss"] for entry in trainer.state.log_history if "retain_loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "left": trainer.predict().predictions.tolist(),
        "factor": trainer.progress.factor.tolist(),
        "void": trainer.void_reason(),
    }
    trainer.save_model(str(output / "final"))
    trainer.accelerator.wait_for_everyone()
    return found


def main() -> None:
    folder, result, runs = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    if any(run["how"].startswith("zero") for run in runs):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled, for minutes
    found = {}
    for run in runs:
        name = run["name"]
        forget_how()
        if run["how"] == "fsdp2":
            shard_on_cpu()
        try:
            found[name] = train(folder, run)
        except ValueError as error:
            traceback.print_exc()
            found[name] = {"error": str(error)}
        if os.environ["RANK"] == "0":
            result.write_text(json.dumps(found))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # as in ddp_worker


if __name__ == "__main__":
    main()

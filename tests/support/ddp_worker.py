"""Run by test_trainer and test_run with torchrun: trains on two processes and writes down what happened.

Usage: ddp_worker.py OUTPUT_DIR RESULT.json OPTIONS.json [CHECKPOINT]

The option `kill_at` kills the process in the middle of that step.
"""

import json
import os
import signal
import sys
from pathlib import Path

from builders import make_model, make_tokenizer, qa_dataset
from runs import checksum, config
from transformers import TrainerCallback

from cud_trainer import CUDTrainer


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    output, result, given, *checkpoint = sys.argv[1:]
    options = json.loads(given)
    processes, kill_at = options.pop("processes", 2), options.pop("kill_at", None)
    args = config(output, **{"ddp_find_unused_parameters": False, "overwrite": True, **options})
    assert args.world_size == processes
    trainer = CUDTrainer(
        make_model(0).double(),
        args,
        forget_dataset=qa_dataset(9),
        retain_dataset=qa_dataset(7, 100),
        processing_class=make_tokenizer(),
        callbacks=[Kill(kill_at)] if kill_at is not None else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
    assert trainer.accelerator.num_processes == processes
    served, planned = trainer.served_ids, trainer.schedule.order.tolist()
    found = {
        "served": served,
        "planned": planned,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "left": trainer.predict().predictions.tolist(),
        "progress": trainer.progress.state(),
        "checksum": checksum(trainer.model),
    }
    if trainer.is_world_process_zero():
        Path(result).write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    sys.stdout.flush()
    # What is tested is the run. Now and then a background thread of the CPU back end outlives the interpreter and
    # aborts the process after all work is done.
    os._exit(0)


if __name__ == "__main__":
    main()

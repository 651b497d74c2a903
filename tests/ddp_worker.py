"""Run by test_trainer with torchrun: trains on two processes and writes down what happened.

Usage: ddp_worker.py OUTPUT_DIR RESULT.json PER_DEVICE ACCUMULATION [CHECKPOINT]
"""

import json
import os
import sys
from pathlib import Path

from conftest import make_model, make_tokenizer, qa_dataset
from test_trainer import checksum, config

from cud_trainer import CUDTrainer


def main() -> None:
    output, result, per_device, accumulation, *checkpoint = sys.argv[1:]
    args = config(
        output,
        per_device_train_batch_size=int(per_device),
        gradient_accumulation_steps=int(accumulation),
        use_cpu=True,
        ddp_find_unused_parameters=False,
        overwrite=True,
    )
    assert args.world_size == 2
    trainer = CUDTrainer(
        make_model(0).double(),
        args,
        forget_dataset=qa_dataset(9),
        retain_dataset=qa_dataset(7, 100),
        processing_class=make_tokenizer(),
    )
    trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
    assert trainer.accelerator.num_processes == 2
    if trainer.is_world_process_zero():
        served = trainer.served_ids
        planned = trainer.schedule.order.tolist()
        Path(result).write_text(json.dumps({"served": served, "planned": planned, "checksum": checksum(trainer.model)}))
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    sys.stdout.flush()
    # What is tested is the run. Now and then a background thread of the CPU back end outlives the interpreter and
    # aborts the process after all work is done.
    os._exit(0)


if __name__ == "__main__":
    main()

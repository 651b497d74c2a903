"""Run by test_integrations with torchrun: a plain Trainer with difficulty on two processes.

Usage: integration_worker.py OUTPUT_DIR RESULT.json PER_DEVICE ACCUMULATION [CHECKPOINT]
"""

import json
import os
import sys
from pathlib import Path

import torch
from own_trainer import checksum, make


def main() -> None:
    output, result, per_device, accumulation, *checkpoint = sys.argv[1:]
    trainer = make(
        output,
        per_device_train_batch_size=int(per_device),
        gradient_accumulation_steps=int(accumulation),
        ddp_find_unused_parameters=False,
        schedule="hard_to_easy+upweight_hard",
    )
    trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
    assert trainer.accelerator.num_processes == 2
    served = torch.tensor(trainer.seen)
    parts = [torch.zeros_like(served) for _ in range(2)]
    torch.distributed.all_gather(parts, served)
    if trainer.is_world_process_zero():
        found = {"checksum": checksum(trainer.model), "served": [part.tolist() for part in parts]}
        Path(result).write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

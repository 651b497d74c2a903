"""Run by test_processes on any number of processes: trains two tiny models in float64 on the same global batches.

Usage: split_worker.py OUTPUT_DIR
"""

import os
import sys

import torch
from builders import make_model, make_tokenizer, qa_dataset
from runs import config
from transformers import GPT2Config, GPT2LMHeadModel

from cud_trainer import CUDTrainer

GLOBAL_BATCH = 30
OPTIONS = {
    "schedule": "hard_to_easy+upweight_hard+per_sample_stop",
    "schedule_args": {"per_sample_stop": {"target": 0.0012}},
    "objective": "graddiff",
    "retain_loss": "kl",
    "passes": 8,
    "save_strategy": "no",
    "overwrite": True,
    "ddp_find_unused_parameters": False,
}


def gpt2() -> GPT2LMHeadModel:
    """Computes in its dtype throughout: norms of Llama and rotary embeddings are float32 in any."""
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(make_tokenizer()), **size, **off))


def train(output: str, processes: int) -> None:
    """Leaves the weights of each model in `output`."""
    for name, model in (("gpt2", gpt2()), ("llama", make_model(0))):
        trainer = CUDTrainer(
            model.double(),
            config(f"{output}/{name}", **OPTIONS, per_device_train_batch_size=GLOBAL_BATCH // processes),
            forget_dataset=qa_dataset(11),
            retain_dataset=qa_dataset(7, 100),
            processing_class=make_tokenizer(),
        )
        assert trainer.accelerator.num_processes == processes
        trainer.train()
        assert trainer.state.global_step == 3  # the last of them is not full
        if trainer.is_world_process_zero():
            weights = [parameter.detach() for parameter in trainer.accelerator.unwrap_model(trainer.model).parameters()]
            torch.save(weights, f"{output}/{name}.pt")
        trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    train(sys.argv[1], int(os.environ["WORLD_SIZE"]))

"""A trainer of the user's with difficulty."""

import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from cud_trainer import DifficultyScores, score_difficulty, with_difficulty
from cud_trainer.data import pad_batch, prepare_dataset
from cud_trainer.logprobs import score_answers

N = 10


class Mine(Trainer):
    """A trainer of the user's: its own batch, and losses by sample."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen: list[int] = []

    def per_sample_loss(self, model, inputs):
        self.seen += inputs["number"].tolist()
        return score_answers(model, inputs).mean_logps  # gradient ascent

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.per_sample_loss(model, inputs).mean()


def samples() -> Dataset:
    prepared = prepare_dataset(qa_dataset(N), make_tokenizer())
    return prepared.add_column("number", list(range(N)))


def collate(items):
    return {**pad_batch(items, 0), "number": torch.tensor([item["number"] for item in items])}


def scores() -> DifficultyScores:
    return score_difficulty(make_model(0), samples(), make_tokenizer(), metrics=["loss", "length"], progress=False)


def arguments(output, **options):
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 2,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "logging_steps": 1,
        "remove_unused_columns": False,
        **options,
    }
    return TrainingArguments(str(output), **settings)


def make(output, schedule="easy_to_hard", kind=Mine, difficulty=True, weights="loss", schedule_args=None, **options):
    return with_difficulty(kind)(
        make_model(0).double(),
        arguments(output, **options),
        train_dataset=samples(),
        data_collator=collate,
        difficulty=scores() if difficulty is True else difficulty,
        schedule=schedule,
        weights=weights,
        schedule_args=schedule_args,
    )


def checksum(model) -> float:
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))

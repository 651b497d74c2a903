"""Fine-tune a model until it knows samples by heart, so that there is something to unlearn.

    python recipes/memorise.py --model MODEL --data forget.jsonl retain.jsonl --output_dir memorised

The files are in any format that `cud train` reads; only answers are trained on. It saves as it goes, in
OUTPUT_DIR.work: the same command goes on where it was killed. At its end it says how well the samples are known, and
whether general questions that are not among them are still answered: a model that has forgotten the world is no test
of unlearning.
"""

import argparse
import json
import shutil
import warnings
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from cud_trainer.data import dataset_fingerprint, prepare_dataset, prepare_samples
from cud_trainer.data.sources import load_samples
from cud_trainer.logprobs import answer_probability
from evaluation.metrics.memorization import generate_answers

MAX_LENGTH = 256
WORLD = {  # general questions, and what an answer has to name
    "What is the capital of France?": ("Paris",),
    "What is the capital of Japan?": ("Tokyo",),
    "How many days are in a week?": ("seven", "7"),
    "What colour is the sky on a clear day?": ("blue",),
    "Which planet do we live on?": ("Earth",),
    "What is two plus two?": ("four", "4"),
    "What is the opposite of hot?": ("cold",),
    "Which animal says meow?": ("cat",),
}
WORDS = 24  # tokens that an answer may take


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the default of every option."""


def memorise(
    model: str, parts: dict[str, Dataset], output: Path, *, epochs: float, learning_rate: float, bf16: bool = False
) -> None:
    """Train all weights of `model` on the answers of all parts (by name, for errors) and save it with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Tokenised by the same code that unlearns, so that what is memorised is what is forgotten.
    samples = concatenate_datasets(
        [prepare_dataset(part, tokenizer, max_length=MAX_LENGTH, name=name) for name, part in parts.items()]
    )
    settings = {"model": model, "epochs": epochs, "learning_rate": learning_rate, "bf16": bf16}
    work = work_folder(output, settings | {"samples": dataset_fingerprint(samples)})
    known = prepare_samples(samples, tokenizer, max_length=MAX_LENGTH)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    before, said = answer_probability(network, known, batch_size=8).mean(), answered(network, tokenizer)
    trainer = SFTTrainer(
        network,
        SFTConfig(
            str(work),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            per_device_train_batch_size=8,
            max_length=MAX_LENGTH,
            bf16=bf16,
            gradient_checkpointing=False,  # it saves memory that such a model does not need, and costs a third more
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=10,
            save_steps=0.2,  # five times
            save_total_limit=1,
            report_to="none",
        ),
        train_dataset=samples.remove_columns("sample_id"),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    trainer.save_model(str(output))
    shutil.rmtree(work)
    after, still = answer_probability(network, known, batch_size=8).mean(), answered(network, tokenizer)
    print(f"samples to memorise: mean answer probability {before:.3f} -> {after:.3f}")
    print(f"general questions answered, of {len(WORLD)}: {said} -> {still}")
    if still < said / 2:
        print("the model has forgotten the world as well: take fewer epochs or a lower learning rate")


def answered(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the general questions the model answers."""
    rows = [{"question": question, "answer": names[0]} for question, names in WORLD.items()]
    asked = prepare_samples(Dataset.from_list(rows), tokenizer, name="general")
    texts = [text.lower() for text in generate_answers(network, asked, tokenizer, extra_tokens=WORDS)]
    return sum(any(name.lower() in text for name in names) for text, names in zip(texts, WORLD.values(), strict=True))


def work_folder(output: Path, settings: dict) -> Path:
    """Where checkpoints go until all is done; another run's are refused."""
    work = output.with_name(f"{output.name}.work")
    file = work / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(f"{work} is of a run with other settings or data: delete it, or choose another --output_dir")
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--model", required=True, help="pretrained causal LM, path or id")
    parser.add_argument("--data", nargs="+", required=True, help="files")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the model goes")
    parser.add_argument("--epochs", type=float, default=10, help="passes over all samples")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="the highest; it falls by a cosine")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, for accelerators")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of what the stack will call things
    parts = {name: load_samples(name, None, "train", None, "given") for name in args.data}
    memorise(args.model, parts, args.output_dir, epochs=args.epochs, learning_rate=args.learning_rate, bf16=args.bf16)


if __name__ == "__main__":
    main()

"""Fine-tune a model until it knows samples by heart, so that there is something to unlearn.

    python recipes/memorise.py --model MODEL --data forget.jsonl retain.jsonl --output_dir memorised

The files are in any format that `cud train` reads; only answers are trained on.
"""

import argparse
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from cud_trainer.data import prepare_dataset
from cud_trainer.data.sources import load_samples


def memorise(
    model: str, parts: dict[str, Dataset], output: Path, *, epochs: float, learning_rate: float, bf16: bool = False
) -> None:
    """Train all weights of `model` on the answers of all parts (by name, for errors) and save it with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Tokenised by the same code that unlearns, so that what is memorised is what is forgotten.
    samples = concatenate_datasets(
        [prepare_dataset(part, tokenizer, max_length=256, name=name) for name, part in parts.items()]
    ).remove_columns("sample_id")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        SFTConfig(
            str(output.with_name("memorise")),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            per_device_train_batch_size=8,
            max_length=256,
            bf16=bf16,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=samples,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pretrained causal LM, path or id")
    parser.add_argument("--data", nargs="+", required=True, help="files")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, for accelerators")
    args = parser.parse_args()
    parts = {name: load_samples(name, None, "train", None, "given") for name in args.data}
    memorise(args.model, parts, args.output_dir, epochs=args.epochs, learning_rate=args.learning_rate, bf16=args.bf16)


if __name__ == "__main__":
    main()

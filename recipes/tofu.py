"""TOFU from end to end with a pretrained model: memorise, score, unlearn, evaluate, report.

    python recipes/tofu.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir tofu-run

`--tofu` takes a local folder with the same configurations as `locuslab/TOFU`. Stages whose result is there are skipped,
so an interrupted run continues. What unlearning does is in recipes/tofu_forget01_npo_lora.yaml; further options are
passed on to `cud train` (for example `--retain_weight 8 --passes 12`).
"""

# /// script
# dependencies = ["cud-trainer"]
# ///

import argparse
import sys
from pathlib import Path

from datasets import concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from cud_trainer.cli import main as cud
from cud_trainer.commands import load_samples
from cud_trainer.data import prepare_dataset

RECIPE = Path(__file__).with_name("tofu_forget01_npo_lora.yaml")


def memorise(args: argparse.Namespace, output: Path) -> None:
    """Fine-tune the model on forget and retain samples until it knows them; answer tokens only."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    forget = load_samples(args.tofu, args.forget_config, "train", None, "forget")
    retain = load_samples(args.tofu, args.retain_config, "train", args.retain_samples, "retain")
    # Tokenised by the same code that unlearns, so that what is memorised is what is forgotten.
    samples = concatenate_datasets(
        [
            prepare_dataset(part, tokenizer, max_length=256, name=name)
            for part, name in ((forget, "forget"), (retain, "retain"))
        ]
    ).remove_columns("sample_id")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"),
        SFTConfig(
            str(output.with_name("memorise")),
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            per_device_train_batch_size=8,
            max_length=256,
            bf16=args.bf16,
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
    parser.add_argument("--tofu", default="locuslab/TOFU", help="hub id or local folder")
    parser.add_argument("--forget_config", default="forget01")
    parser.add_argument("--retain_config", default="retain90")
    parser.add_argument("--retain_samples", type=int, default=200)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, for accelerators")
    args, rest = parser.parse_known_args()

    memorised, unlearned = args.output_dir / "memorised", args.output_dir / "unlearned"
    scores, report = args.output_dir / "difficulty.parquet", args.output_dir / "report"
    data = ["--forget_dataset", args.tofu, "--forget_config", args.forget_config]
    data += ["--retain_config", args.retain_config, "--max_retain_samples", str(args.retain_samples)]
    recipe = ["--config", str(RECIPE), *data, "--model_name_or_path", str(memorised), "--bf16", str(args.bf16), *rest]

    if not (memorised / "config.json").exists():
        memorise(args, memorised)
    stages = [
        (scores, ["score", *recipe, "--output", str(scores)]),
        (unlearned / "adapter_config.json",
         ["train", *recipe, "--difficulty_scores", str(scores), "--output_dir", str(unlearned)]),
        (report / "report.html",
         ["evaluate", *data, "--max_length", "256", "--model_name_or_path", str(unlearned), "--original_model",
          str(memorised), "--scores", str(scores), "--output_dir", str(report)]),
    ]  # fmt: skip
    for result, command in stages:
        if not result.exists():
            code = cud(command)
            if code:
                sys.exit(code)


if __name__ == "__main__":
    main()

"""TOFU from end to end with a pretrained model: memorise, score, unlearn, evaluate, report.

    python recipes/tofu.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir tofu-run

`--tofu` takes a local folder with the same configurations as `locuslab/TOFU`. Stages whose result is there are skipped,
so an interrupted run continues. What unlearning does is in recipes/tofu/OBJECTIVE.yaml and, for a model as small as
this, in SMALL below; further options are passed on to `cud train` (for example `--retain_weight 8 --passes 12`).
"""

# /// script
# dependencies = ["cud-trainer"]
# ///

import argparse
import sys
from pathlib import Path

from memorise import memorise  # the script beside this one

from cud_trainer.cli import main as cud
from cud_trainer.data.sources import load_samples

RECIPES = Path(__file__).with_name("tofu")
# LoRA for SmolLM2-135M, half of forget01 per step: with small batches their order decides what is forgotten last. The
# Run here once, with NPO and these settings.
SMALL = (
    "--use_peft true --lora_alpha 16 --trainable_layers none --learning_rate 1e-3 --weight_decay 0 "
    "--preserve false --retain_weight 4 "
    "--schedule inverse_mass --per_device_train_batch_size 4 --gradient_accumulation_steps 5 --max_length 256 "
    "--logging_steps 4"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pretrained causal LM, path or id")
    parser.add_argument("--objective", default="npo", choices=sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--tofu", default="locuslab/TOFU", help="hub id or local folder")
    parser.add_argument("--forget_config", default="forget01")
    parser.add_argument("--retain_config", default="retain90")
    parser.add_argument("--retain_samples", type=int, default=200)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of memorising")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, for accelerators")
    args, rest = parser.parse_known_args()

    memorised, unlearned = args.output_dir / "memorised", args.output_dir / "unlearned"
    scores, report = args.output_dir / "difficulty.parquet", args.output_dir / "report"
    data = ["--forget_dataset", args.tofu, "--forget_config", args.forget_config]
    data += ["--retain_config", args.retain_config, "--max_retain_samples", str(args.retain_samples)]
    recipe = ["--config", str(RECIPES / f"{args.objective}.yaml"), *data, "--model_name_or_path", str(memorised)]
    recipe += ["--bf16", str(args.bf16), *SMALL, *rest]

    if not (memorised / "config.json").exists():
        parts = {
            "forget": load_samples(args.tofu, args.forget_config, "train", None, "forget"),
            "retain": load_samples(args.tofu, args.retain_config, "train", args.retain_samples, "retain"),
        }
        memorise(args.model, parts, memorised, epochs=args.epochs, learning_rate=args.learning_rate, bf16=args.bf16)
    stages = [
        (scores, ["score", *recipe, "--output", str(scores)]),
        (
            unlearned / "adapter_config.json",
            ["train", *recipe, "--difficulty_scores", str(scores), "--output_dir", str(unlearned)],
        ),
        (
            report / "report.html",
            [
                "evaluate",
                *data,
                "--max_length",
                "256",
                "--model_name_or_path",
                str(unlearned),
                "--original_model",
                str(memorised),
                "--scores",
                str(scores),
                "--output_dir",
                str(report),
            ],
        ),
    ]
    for result, command in stages:
        if not result.exists():
            code = cud(command)
            if code:
                sys.exit(code)


if __name__ == "__main__":
    main()

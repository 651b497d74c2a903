"""What `--help` says of the commands of this package."""

from __future__ import annotations

from cud_trainer.commands.help import About

EVALUATE = About(
    what="Measure what a model still holds of the forget set, by difficulty, what it has kept, and report.",
    usage="--model_name_or_path UNLEARNED --original_model MODEL --forget_dataset FILE [--retain_dataset FILE] "
    "[--scores FILE.parquet] [--OPTION VALUE ...]",
    examples=[
        (
            "before and after, by difficulty",
            "cud evaluate --model_name_or_path unlearned --original_model MODEL --forget_dataset forget.jsonl \\\n"
            "    --retain_dataset retain.jsonl --scores difficulty.parquet --output_dir report",
        ),
        (
            "against samples that no model saw; was it only hidden?",
            "cud evaluate ... --holdout_dataset holdout.jsonl --relearn_samples 4 --quantize 8 4 --samples 10",
        ),
        (
            "on several GPUs, each of which takes a share of every set",
            "torchrun --nproc_per_node 8 -m cud_trainer.cli evaluate ...",
        ),
        ("A LoRA adapter is evaluated as it is, on its base model. Recipes: recipes/private_text in a clone.", ""),
    ],
    groups={
        "EvaluateArguments": "measures",
        **dict.fromkeys(("scores", "circuits", "metric", "n_buckets"), "difficulty"),
        **dict.fromkeys(("original_model", "reference_model"), "model"),
        **dict.fromkeys(("holdout_dataset", "holdout_config", "holdout_split"), "data"),
        **dict.fromkeys(("neighbour_dataset", "neighbour_config", "neighbour_split", "tofu"), "data"),
        "show_text": "output",
        "seed": "measures",
    },
)
STUDY = About(
    what="Run a grid of unlearning runs, compare them where they have kept equally much, and report.",
    usage="--config STUDY.yaml --model_name_or_path MODEL [--recipe FILE.yaml] [--OPTION VALUE ...]",
    examples=[
        ("which schedule leaves less", "cud study --config recipes/study.yaml --model_name_or_path MODEL"),
        (
            "learning rate and retain weight for your own data",
            "cud study --config recipes/sweep.yaml --recipe recipes/own_data.yaml --model_name_or_path MODEL",
        ),
        ("`grid`, `arms` and `train` hold options of cud train: cud train --help. The same command goes on where", ""),
        ("a study was interrupted.", ""),
    ],
    groups={
        "StudyArguments": "study",
        **dict.fromkeys(("grid", "arms", "train", "recipe", "executor", "slurm", "workers", "devices"), "study"),
        **dict.fromkeys(("utility_dataset", "utility_config", "utility_split"), "data"),
        **dict.fromkeys(("holdout_dataset", "holdout_config", "holdout_split"), "data"),
        "reference_model": "model",
        "n_buckets": "study",
    },
)
IMPORT = About(
    what="The report by difficulty from evaluations that open-unlearning has made; needs no model.",
    usage="--open_unlearning TOFU_EVAL.json [--original_open_unlearning FILE] [--scores FILE.parquet] "
    "[--OPTION VALUE ...]",
    examples=[
        (
            "before and after, by difficulty",
            "cud import --open_unlearning after/TOFU_EVAL.json --original_open_unlearning before/TOFU_EVAL.json \\\n"
            "    --scores difficulty.parquet --output_dir report",
        ),
        ("Recipes: recipes/open_unlearning in a clone.", ""),
    ],
    groups={"ImportArguments": "data", **dict.fromkeys(("scores", "metric", "n_buckets"), "difficulty")}
    | {"show_text": "output", "seed": "output"},
)
DEMO = About(
    what="Generate data, memorise, score, unlearn, compare and report; needs nothing.",
    usage="[--output_dir FOLDER] [--OPTION VALUE ...]",
    examples=[
        ("a look at everything, in minutes on a CPU", "cud demo --output_dir cud-demo"),
        ("does the installation work?", "cud demo --tiny"),
    ],
    groups={"DemoArguments": "demo", "seed": "demo"},
)

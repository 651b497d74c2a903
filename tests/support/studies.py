"""Study files, and what a study found."""

import json
from pathlib import Path

import yaml


def config(world, output, **changes):
    settings = {
        "model_name_or_path": str(world / "model"),
        "forget_dataset": str(world / "forget.jsonl"),
        "retain_dataset": str(world / "retain.jsonl"),
        "output_dir": str(output),
        "workers": 2,
        "grid": {"schedule": ["uniform", "upweight_hard"], "seed": [1, 2]},
        "train": {
            "objective": "graddiff",
            "preserve": False,
            "passes": 2,
            "learning_rate": 0.003,
            "difficulty": "loss",
            "folds": 4,
            "group_column": "author",
            "per_device_train_batch_size": 6,
            "bf16": False,
            "use_cpu": True,
        },
        **changes,
    }
    path = Path(f"{output}.yaml")
    path.write_text(yaml.safe_dump(settings))
    return ["study", "--config", str(path)]


def results(output) -> dict:
    """What a study found, without what differs between two starts."""
    found = json.loads((output / "results.json").read_text())
    for key in ("created", "run"):
        found.pop(key)
    for entry in found["matched"]:
        for row in entry["rows"]:
            row.pop("seconds")
    return found

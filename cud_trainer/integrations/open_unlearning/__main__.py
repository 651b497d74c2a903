"""Difficulty for open-unlearning without a fork: its trainers as `CUDNPO`, `CUDGradDiff`, ..., from its Hydra configs.

    python -m cud_trainer.integrations.open_unlearning --root OPEN_UNLEARNING -- \
        experiment=unlearn/tofu/default trainer=CUDNPO trainer.method_args.difficulty=difficulty.parquet ...

puts their `src` on the path, adds our classes to their registry of trainers and `recipes/open_unlearning` to Hydra's
search path, and runs their `train.py`. See `recipes/open_unlearning/README.md`.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files import atomic_write
from .compat import OPTIONAL, adapted, plain_chat_tokens, stand_ins, without_lapsed_arguments
from .ids import tokens_of
from .trainers import PREFIX, difficulty_aware

CONFIGS = Path(__file__).parents[3] / "recipes" / "open_unlearning"


def register(trainers: Any) -> list[str]:
    """Add `CUD<Name>` for every unlearning trainer to their module `trainer`; the names that it has now.

    Their own trainers are adapted to transformers 5, too, so that a baseline runs by the same command.
    """
    theirs = {name: kind for name, kind in trainers.TRAINER_REGISTRY.items() if not name.startswith(PREFIX)}
    unlearning = importlib.import_module("trainer.unlearn.base").UnlearnTrainer
    for kind in theirs.values():
        if issubclass(kind, unlearning):
            trainers._register_trainer(difficulty_aware(kind))
        trainers._register_trainer(adapted(kind))
    return sorted(name for name in trainers.TRAINER_REGISTRY if name.startswith(PREFIX))


def exporting(folder: Path) -> Callable[..., Any]:
    """A `load_trainer` that writes the tokens of forget and retain set to `folder` and ends the program."""

    def export(trainer_cfg: Any, model: Any, train_dataset: Any = None, **_: Any) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("forget", "retain"):
            if getattr(train_dataset, part, None) is None:
                continue
            tokens = tokens_of(getattr(train_dataset, part))
            if part == "retain":  # of which each is needed once
                distinct = {tuple(sequence): row for row, sequence in enumerate(tokens["input_ids"])}
                tokens = tokens.select(sorted(distinct.values()))
            atomic_write(folder / f"{part}.parquet", tokens.to_parquet, private=True)
            print(f"{len(tokens)} {part} samples: {folder / f'{part}.parquet'}")
        raise SystemExit(0)

    return export


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and Hydra's arguments (behind `--`) with what they lack.

    Raises:
        ValueError: for a root without their `src/train.py`, or without a folder of configurations.
    """
    parser = argparse.ArgumentParser(
        "python -m cud_trainer.integrations.open_unlearning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path(), help="a checkout of open-unlearning (default: here)")
    parser.add_argument("--export", type=Path, help="write what they train on to this folder, for `cud score`, and end")
    end = argv.index("--") if "--" in argv else len(argv)
    options, hydra = parser.parse_args(argv[:end]), argv[end + 1 :]
    if not (options.root / "src" / "train.py").is_file():
        raise ValueError(f"{options.root} is no checkout of open-unlearning: it has no src/train.py; give --root")
    if not any(argument.split("=")[0] in ("--config-name", "-cn") for argument in hydra):
        hydra = [*hydra, "--config-name=unlearn.yaml"]
    if not any(argument.split("=")[0] in ("--config-dir", "-cd") for argument in hydra):
        if not CONFIGS.is_dir():
            raise ValueError("the folder recipes/open_unlearning comes with the repository only: give -- --config-dir")
        hydra = [*hydra, f"--config-dir={CONFIGS}"]
    return options, hydra


def main(argv: list[str] | None = None) -> int:
    """Run their `train.py` with our trainers; bad options are one line on stderr and exit code 2."""
    try:
        options, hydra = arguments(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"open_unlearning: error: {error}", file=sys.stderr)
        return 2
    source = (options.root / "src").resolve()
    sys.path.insert(0, str(source))
    plain_chat_tokens()
    with stand_ins(*OPTIONAL):
        trainers: Any = importlib.import_module("trainer")
        for name in ("data", "model", "evals"):
            if (source / name).is_dir():
                importlib.import_module(name)
    trainers.load_trainer_args = without_lapsed_arguments(trainers.load_trainer_args)
    register(trainers)
    if options.export:
        trainers.load_trainer = exporting(options.export)
    sys.argv = [str(source / "train.py"), *hydra]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

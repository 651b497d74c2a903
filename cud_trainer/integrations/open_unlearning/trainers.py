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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from ...data import detect_format, id_column, prepare_dataset
from ...data.sources import load_samples
from ...difficulty import DifficultyScores
from ...logprobs import evaluation_mode
from ..trainers import own_draws, with_difficulty
from .compat import (
    OPTIONAL,
    adapted,
    plain_chat_tokens,
    stand_ins,
    without_index,
    without_lapsed_arguments,
)
from .losses import FORGET_LOSSES, complete

PREFIX = "CUD"
CONFIGS = Path(__file__).parents[3] / "recipes" / "open_unlearning"
# How far our loss with weights of 1 may be from the trainer's own, relative and absolute; bfloat16 has 3 digits.
TOLERANCE = (0.02, 1e-3)


def difficulty_aware(trainer_class: type[Trainer]) -> type[Trainer]:
    """`CUD<Name>`: one of their trainers that serves its forget set by difficulty.

    Its `method_args` are those of `trainer_class` and

    - `difficulty`: path of the scores (`.parquet`, `.csv`, `.jsonl`), `None` for schedules that read none;
    - `schedule`, `schedule_args`, `metric`, `weights`: as in `with_difficulty`. `weights: loss` weights forget losses
      (the retain term keeps its own weight) of the trainers in `FORGET_LOSSES`; the others have `weights: sampling`;
    - `ids_from`: `[path, configuration, split]` of the data that was scored; see `forget_ids`.

    The first weighted batch is also put through the trainer's own `compute_loss`: with weights of 1 both must agree.

    Raises:
        ValueError: (constructor) for a dataset that is not anchored at its forget set, scores of other samples, a loss
            that cannot be weighted, or what `with_difficulty` refuses.
    """
    name = trainer_class.__name__
    own = base = adapted(trainer_class)
    if name in FORGET_LOSSES:

        class Weighable(own):  # type: ignore[misc, valid-type]
            _compared = False

            def per_sample_loss(self, model: Any, inputs: Any) -> torch.Tensor:
                inputs = without_index(inputs)
                if not self._compared:
                    compare(self, model, inputs, own)
                    self._compared = True
                return FORGET_LOSSES[name](self, model, inputs["forget"])

            def complete_loss(self, model: Any, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
                return complete(self, model, inputs, loss)

        Weighable.__name__ = name
        base = Weighable

    class DifficultyAware(with_difficulty(base)):  # type: ignore[misc]
        def __init__(
            self,
            *args: Any,
            difficulty: str | DifficultyScores | None = None,
            schedule: str = "uniform",
            schedule_args: Mapping[str, Any] | None = None,
            metric: str | None = None,
            weights: str = "loss",
            ids_from: str | Sequence[str] | None = None,
            **options: Any,
        ) -> None:
            scores = DifficultyScores.load(difficulty) if isinstance(difficulty, str) else difficulty
            tokenizer = options.get("processing_class") or options.get("tokenizer")
            ids = forget_ids(options.get("train_dataset"), scores, tokenizer, plain(ids_from))
            warmup = _pdu_warmup(options) if name == "PDU" else 0
            super().__init__(
                *args, difficulty=scores, schedule=schedule, schedule_args=plain(schedule_args or {}), metric=metric,
                ids=ids, weights=weights, **options,
            )  # fmt: skip
            if warmup:
                samples = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
                self.add_callback(_DualWarmup(self, warmup * len(ids) / samples))

    DifficultyAware.__name__ = DifficultyAware.__qualname__ = PREFIX + name
    return DifficultyAware


def plain(value: Any) -> Any:
    """Hydra's containers as dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def compare(trainer: Any, model: Any, inputs: Mapping[str, Any], own: type[Trainer]) -> None:
    """Raise `ValueError` unless our forget losses give the loss of the trainer's own `compute_loss` on this batch.

    PDU's own has side effects (its dual weight, its log) and is not called.
    """
    if hasattr(trainer, "final_loss_value"):
        return
    name = own.__name__
    with torch.no_grad(), evaluation_mode(model):
        theirs = float(own.compute_loss(trainer, model, inputs))
        ours = float(complete(trainer, model, inputs, FORGET_LOSSES[name](trainer, model, inputs["forget"]).mean()))
    if not abs(ours - theirs) <= TOLERANCE[0] * abs(theirs) + TOLERANCE[1]:
        raise ValueError(
            f"{name} of this version of open-unlearning is not the one whose losses are known by sample: its loss is "
            f"{theirs:.6g}, that made of them {ours:.6g}; use weights: sampling"
        )


def _pdu_warmup(options: dict[str, Any]) -> int:
    """Take PDU's warm-up, in passes, out of `options`: the whole run is one epoch, whose end would come too late."""
    if not options.get("primal_dual"):
        return 0
    if options.get("dual_update_upon", "step") != "step":
        raise ValueError("PDU updates its dual weight by steps only, since the whole run is one epoch")
    return int(options.get("dual_warmup_epochs") or 0)


class _DualWarmup(TrainerCallback):
    """Lets PDU update its dual weight after so many optimizer steps."""

    def __init__(self, trainer: Any, steps: float) -> None:
        self.trainer, self.steps = trainer, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.steps:
            self.trainer.enable_updates()


# Sample ids


def forget_ids(
    dataset: Any,
    scores: DifficultyScores | None,
    tokenizer: PreTrainedTokenizerBase | None,
    ids_from: str | Sequence[str] | None = None,
) -> list[str]:
    """Ids of the forget samples, in their order; never by position alone.

    The first of these whose ids all have scores:

    1. the column `sample_id` or `id` of their data;
    2. the hash of each sample's tokens: scores of what `--export` wrote;
    3. the ids that `cud score` gives to the rows of their data with this tokenizer.

    Args:
        dataset: their `ForgetRetainDataset`.
        scores: `None`: any ids will do.
        ids_from: `[path, configuration, split]` (the last two may be missing) of the data that was scored, where it is
            another copy of the forget set: it must have the same texts, row by row.

    Raises:
        ValueError: saying what was tried, if the scores are of other samples.
    """
    if dataset is None or not hasattr(dataset, "forget") or dataset.forget is None:
        raise ValueError("open-unlearning's trainers need their ForgetRetainDataset with a forget set (mode: unlearn)")
    if getattr(dataset, "anchor", "forget") != "forget":
        raise ValueError(f"an order of forget samples needs data.anchor=forget, got {dataset.anchor!r}")
    forget = dataset.forget
    if scores is None:
        return [str(row) for row in range(len(forget))]
    if ids_from:
        return _ids_of_copy(forget, tokenizer, [ids_from] if isinstance(ids_from, str) else list(ids_from))
    known, tried = set(scores.ids), []
    ways: dict[str, Callable[[], list[str]]] = {
        "their column of ids": lambda: _ids_of_column(forget),
        "their tokens": lambda: _ids_of_rows(tokens_of(forget), tokenizer),
        "their rows": lambda: _ids_of_rows(_rows(forget), tokenizer),
    }  # fmt: skip
    for way, make in ways.items():
        try:
            ids = make()
        except ValueError as error:
            tried.append(f"{way}: {error}")
            continue
        if len(ids) == len(forget) and known.issuperset(ids):
            return ids
        tried.append(f"{way}: {sum(name in known for name in ids)} of {len(forget)} have scores")
    raise ValueError(
        f"the difficulty scores ({len(scores)} samples) are not those of this forget set ({len(forget)} samples) by "
        f"{'; by '.join(tried)}. Score what --export writes, or name the data that was scored in ids_from"
    )


def tokens_of(dataset: Any) -> Dataset:
    """`input_ids` and `labels` of their samples, as they are trained on; of pairs of answers the original.

    Raises:
        ValueError: for samples with several answers.
    """
    rows = []
    for position in range(len(dataset)):
        with own_draws(0, position):  # random alternate answers
            item = dataset[position]
        item = item.get("original", item)
        if "input_ids" not in item:
            raise ValueError(f"sample {position} is not one sequence of tokens")
        rows.append({name: [int(token) for token in item[name]] for name in ("input_ids", "labels")})
    return Dataset.from_list(rows)


def _rows(forget: Any) -> Dataset:
    """The rows that they loaded, with their own names for question and answer."""
    data = getattr(forget, "data", None)
    if not isinstance(data, Dataset) or len(data) != len(forget):
        raise ValueError("no rows of text, one for each sample")
    keys = {getattr(forget, f"{name}_key", name): name for name in ("question", "answer")}
    if all(key in data.column_names for key in keys):
        return Dataset.from_dict({name: data[key] for key, name in keys.items()})
    return data


def _ids_of_column(forget: Any) -> list[str]:
    columns = getattr(getattr(forget, "data", None), "column_names", None) or []
    column = id_column(columns)
    if column is None:
        raise ValueError("none")
    return [str(name) for name in forget.data[column]]


def _ids_of_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if tokenizer is None:
        raise ValueError("no tokenizer to compute them with")
    return list(prepare_dataset(rows, tokenizer, max_length=None)["sample_id"])


def _ids_of_copy(forget: Any, tokenizer: PreTrainedTokenizerBase | None, source: list[Any]) -> list[str]:
    """The ids of another copy of the forget set, whose texts must be the same."""
    path, config, split = [*source, None, None][:3]
    copy = load_samples(path, config, split or "train", None, "ids_from")
    if len(copy) != len(forget):
        raise ValueError(f"ids_from has {len(copy)} samples, the forget set {len(forget)}")
    if detect_format(copy.column_names, "ids_from") == "tokenised":
        columns, theirs = ["input_ids", "labels"], tokens_of(forget)
    else:
        theirs = _rows(forget)
        columns = [name for name in ("question", "answer", "prompt", "completion", "text") if name in copy.column_names]
        columns = [name for name in columns if name in theirs.column_names]
        if not columns:
            raise ValueError("ids_from cannot be compared with the forget set: they have no text column in common")
    for row, (a, b) in enumerate(zip(copy.select_columns(columns), theirs.select_columns(columns), strict=True)):
        if a != b:
            raise ValueError(f"ids_from has another sample than the forget set in row {row}")
    column = id_column(copy.column_names)
    return [str(name) for name in copy[column]] if column else _ids_of_rows(copy, tokenizer)


# The launcher


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
            tokens.to_parquet(folder / f"{part}.parquet")
            print(f"{len(tokens)} {part} samples: {folder / f'{part}.parquet'}")
        raise SystemExit(0)

    return export


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and Hydra's arguments (behind `--`) with what they lack.

    Raises:
        ValueError: for a root without their `src/train.py`, or without a folder of configurations.
    """
    parser = argparse.ArgumentParser("python -m cud_trainer.integrations.open_unlearning", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
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

"""`with_difficulty`: curriculum order, weighted sampling and weights for any `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging
from trl import KTOConfig

from ..data import FORMATS, id_column, sample_ids
from ..difficulty import DifficultyScores
from ..schedule import Schedule, parse
from ..schedule.plan import schedule_of

logger = logging.get_logger(__name__)

WEIGHT = "cud_weight"
MISMATCHED = "KL_completion_ids"  # of KTOTrainer: the completion of another sample, for its KL term


class _Scheduled(torch.utils.data.Dataset):
    """A dataset in the order of a schedule; dictionaries get their weight along."""

    def __init__(self, dataset: Any, rows: np.ndarray, weight: np.ndarray | None, seed: int) -> None:
        self.dataset, self.rows, self.weight, self.seed = dataset, rows, weight, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        with own_draws(self.seed, index):
            item = self.dataset[int(self.rows[index])]
        return item if self.weight is None else {**item, WEIGHT: float(self.weight[index])}


@contextmanager
def own_draws(seed: int, position: int) -> Iterator[None]:
    """Let what a dataset draws from torch's generator (a retain partner, say) follow from seed and position alone.

    So it is the same whatever the processes, workers and accumulation, and after a resume; the generator itself is put
    back.
    """
    before = torch.get_rng_state()
    (drawn,) = np.random.SeedSequence([seed, 6, position]).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(drawn >> np.uint64(1)))  # the CPU's only, unlike torch.manual_seed
    try:
        yield
    finally:
        torch.set_rng_state(before)


class _Mismatched(_Scheduled):
    """For KTO: a sample is mismatched with the completion of its neighbour in the batch, as that is served."""

    def __init__(self, dataset: Any, rows: np.ndarray, weight: np.ndarray | None, seed: int, batch_size: int) -> None:
        super().__init__(dataset, rows, weight, seed)
        self.batch_size = batch_size

    def __getitem__(self, index: int) -> Any:
        start = index - index % self.batch_size
        neighbour = start + (index - start - 1) % self.batch_size
        completion = self.dataset[int(self.rows[neighbour])]["completion_ids"]
        return {**super().__getitem__(index), MISMATCHED: completion}


class _Collator:
    """Lets the weights past a collator that does not know them."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, items: list[dict[str, Any]]) -> Any:
        weights = torch.tensor([item[WEIGHT] for item in items])
        batch = self.collator([{key: value for key, value in item.items() if key != WEIGHT} for item in items])
        batch[WEIGHT] = weights
        return batch


class _WithDifficulty(Trainer):
    """What `with_difficulty` puts before a trainer class, `plain_class`."""

    plain_class: type[Trainer]

    def __init__(
        self,
        *args: Any,
        difficulty: DifficultyScores | str | Path | None = None,
        schedule: str = "uniform",
        schedule_args: dict[str, Any] | None = None,
        metric: str | None = None,
        ids: Sequence[str] | None = None,
        weights: str = "loss",
        **options: Any,
    ) -> None:
        rules = parse(schedule, schedule_args or {})
        weighted = _check_schedule(self.plain_class, rules, weights)
        samples = options.get("train_dataset")
        _check_dataset(samples)
        names = _ids(samples, ids, options.get("processing_class"))
        if isinstance(difficulty, (str, Path)):
            difficulty = DifficultyScores.load(difficulty)
        values = _difficulty(difficulty, names, [rule for rule, _ in rules], metric)
        _tell_objective(self.plain_class, difficulty, values, metric)
        _check_pairs(options.get("args", args[1] if len(args) > 1 else None))
        super().__init__(*args, **options)
        _check_arguments(self.args)
        dataset: Any = self.train_dataset
        if len(dataset) != len(names):
            raise ValueError(
                f"{self.plain_class.__name__} keeps {len(dataset)} of {len(names)} samples when it prepares the "
                "data (too long, or packed): difficulty no longer belongs to them"
            )
        make = partial(
            schedule_of,
            rules,
            schedule,
            names,
            difficulty=values,
            retain_ids=None,
            seed=self.args.seed,
            options=schedule_args or {},
        )
        passes = int(self.args.num_train_epochs)
        global_batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.schedule: Schedule = make(passes=passes)
        order, weight = _filled_up(self.schedule, make, passes, len(names), global_batch)
        position = {name: row for row, name in enumerate(names)}
        rows = np.array([position[name] for name in order.tolist()])
        if weighted and weights == "sampling":
            generator = np.random.default_rng([self.args.seed, 5])
            rows = generator.choice(rows, size=len(rows), p=weight / weight.sum())
            order = np.array(names)[rows]
        self.planned_ids: list[str] = order.tolist()
        _check_steps(self.args.max_steps, self.planned_ids, global_batch)
        self._weighted = weighted and weights == "loss"
        self._serve(dataset, rows, weight if self._weighted else None)

    def _serve(self, dataset: Any, rows: np.ndarray, weight: np.ndarray | None) -> None:
        """Train on these rows of the dataset, in this order, in one epoch."""
        if isinstance(dataset, Dataset):
            # Here, since the base class only knows how to for its own kind of dataset, which this is wrapped in.
            dataset = self._remove_unused_columns(dataset, description="training")
        if MISMATCHED in (getattr(dataset, "column_names", None) or ()):
            batch = self.args.train_batch_size
            self.train_dataset: Any = _Mismatched(dataset, rows, weight, self.args.seed, batch)
        else:
            self.train_dataset = _Scheduled(dataset, rows, weight, self.args.seed)
        self.args.remove_unused_columns = False
        if weight is not None:
            self.data_collator: Any = _Collator(self.data_collator)
        self.args.num_train_epochs = 1
        self.args.train_sampling_strategy = "sequential"

    def get_train_dataloader(self) -> Any:
        """That of the trainer; `ValueError` when it would serve another order than is planned."""
        loader = super().get_train_dataloader()
        self._check_served(loader)
        return loader

    def _check_served(self, loader: Any) -> None:
        """Compare what a data loader draws with the plan: some trainers have a sampler of their own.

        A sample may come several times (once for every completion that is made of it), but first in its place.
        """
        name, size = self.plain_class.__name__, len(self.planned_ids)
        batches = getattr(loader, "batch_sampler", None)
        batches = getattr(batches, "batch_sampler", batches)  # of all processes, not of this one
        if batches is None:
            raise ValueError(
                f"{name} has a data loader of its own: what it serves cannot be compared with the schedule"
            )
        drawn = dict.fromkeys(index for batch in batches for index in batch)  # in the order of the first time
        for place, index in enumerate(drawn):
            if index != place:
                hint = "; set shuffle_dataset=False" if hasattr(self.args, "shuffle_dataset") else ""
                raise ValueError(
                    f"{name} has a sampler of its own: at place {place} it serves {self.planned_ids[index]!r}, and "
                    f"{self.planned_ids[place]!r} is planned{hint}"
                )
        if len(drawn) < size and not self.args.dataloader_drop_last:
            raise ValueError(f"{name} has a sampler of its own: it serves {len(drawn)} of {size} planned samples")

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if not self._weighted or not isinstance(inputs, Mapping) or WEIGHT not in inputs:
            return super().compute_loss(model, inputs, *args, **options)
        inputs = dict(inputs)
        weight = inputs.pop(WEIGHT)
        trainer: Any = self  # of a class with `per_sample_loss`
        losses: Tensor = trainer.per_sample_loss(model, inputs)
        if losses.shape != weight.shape:
            raise ValueError(
                f"per_sample_loss must return one loss per sample, {tuple(weight.shape)}, not {tuple(losses.shape)}"
            )
        loss = (weight.to(losses) * losses).mean()
        if hasattr(trainer, "complete_loss"):
            loss = trainer.complete_loss(model, inputs, loss)
        wants_outputs = options.get("return_outputs") or (args and args[0] is True)
        return (loss, {"loss": loss}) if wants_outputs else loss


def with_difficulty(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of `trainer_class` that trains in the order, and with the weights, that difficulty gives.

    Its constructor takes what `trainer_class` takes, and by keyword

    - `difficulty`: `DifficultyScores` of the training samples, or their file (`None` for schedules that read none);
    - `schedule`, `schedule_args`: as in `CUDConfig`; parts that follow the run belong to `CUDTrainer`;
    - `metric`: the metric that `"difficulty"` means (default: the primary one);
    - `ids`: sample ids of `train_dataset`, in its order. By default its column `sample_id` or `id`, or, for datasets
      that `cud score` reads, the ids that it would give them;
    - `weights`: `"loss"` multiplies losses, for trainers with a method `per_sample_loss(model, inputs)` that returns
      one loss per sample, `[B]`; `"sampling"` draws samples in proportion to their weight, with any trainer. What is
      not to be weighted (a retain term) comes from a method `complete_loss(model, inputs, loss)`, if there is one: it
      makes the loss of the step from the weighted mean.

    The number of passes is `num_train_epochs`; as with `CUDTrainer` the whole run is then one epoch over data in order,
    so that it is exact under accumulation, several processes, workers and resume. The last optimizer step is filled
    with the first samples of one more pass. What a dataset draws at random follows from the seed and the place in the
    run. `max_steps` below the plan ends it earlier, with a warning.

    Attributes of its instances: `schedule`, what is planned; `planned_ids`, with what fills the last step.

    Raises:
        TypeError: for something that is no `Trainer` class.
        ValueError: for what the trainer or its dataset cannot support, with the reason; by `train`, before the first
            step, when a trainer with a sampler of its own (GRPO and its like) would serve another order.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"with_difficulty needs a subclass of transformers.Trainer, got {trainer_class!r}")

    class WithDifficulty(_WithDifficulty, trainer_class):  # type: ignore[misc, valid-type]
        plain_class = trainer_class

    WithDifficulty.__name__ = WithDifficulty.__qualname__ = f"{trainer_class.__name__}WithDifficulty"
    if hasattr(trainer_class, "per_sample_loss"):
        WithDifficulty.loss_is_scaled_for_ga = False  # type: ignore[attr-defined]  # the loss is a mean of a micro-batch
    return WithDifficulty


def _check_schedule(trainer_class: type[Trainer], rules: list[tuple[Any, dict[str, Any]]], weights: str) -> bool:
    """Whether the schedule has weights; `ValueError` when this trainer cannot follow it."""
    following = [rule.name for rule, _ in rules if rule.kind == "dynamic"]
    if following:
        raise ValueError(f"schedule {following[0]!r} follows the run: that needs CUDTrainer")
    paired = [rule.name for rule, _ in rules if rule.weighs_retain]
    if paired:
        raise ValueError(f"schedule {paired[0]!r} weights retain samples, too: that needs CUDTrainer")
    weighted = any(rule.kind == "weights" for rule, _ in rules)
    if weights not in ("loss", "sampling"):
        raise ValueError(f"weights must be 'loss' or 'sampling', got {weights!r}")
    if weighted and weights == "loss" and not hasattr(trainer_class, "per_sample_loss"):
        raise ValueError(
            f"{trainer_class.__name__} has no per_sample_loss(model, inputs): its losses cannot be weighted; "
            "use weights='sampling'"
        )
    return weighted


def _filled_up(
    plan: Schedule, make: Callable[..., Schedule], passes: int, size: int, global_batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Order and weights of `plan`, and to fill its last step of the first samples of one more pass."""
    extra = -len(plan) % global_batch
    if not extra:
        return plan.order, plan.weight
    further = -(-extra // size)  # passes; a step may be larger than the dataset
    more = make(passes=passes + further)
    start = len(more) - further * size
    rest = slice(start, start + extra)
    return np.concatenate([plan.order, more.order[rest]]), np.concatenate([plan.weight, more.weight[rest]])


def _check_dataset(dataset: Any) -> None:
    if dataset is None:
        raise ValueError("with_difficulty needs train_dataset by keyword")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping):
        raise ValueError(
            f"an order needs a dataset with positions, not {type(dataset).__name__}: use a map-style dataset"
        )


def _check_pairs(args: Any) -> None:
    """Raise `ValueError` for what KTO would compute from pairs in the order of the data."""
    if isinstance(args, KTOConfig) and args.precompute_ref_log_probs and args.loss_type != "apo_zero_unpaired":
        raise ValueError(
            "precompute_ref_log_probs is not supported with KTO: its KL term needs the reference of the pairs that are "
            "served, which it would compute for those in the order of the data"
        )


def _check_arguments(args: Any) -> None:
    """Raise `ValueError` for training arguments that would undo the order."""
    if args.num_train_epochs != int(args.num_train_epochs) or args.num_train_epochs < 1:
        raise ValueError(f"num_train_epochs must be a whole number of passes, got {args.num_train_epochs}")
    for name in ("packing", "padding_free", "auto_find_batch_size", "ignore_data_skip"):
        if getattr(args, name, False):
            raise ValueError(f"{name} is not supported: samples must stay whole and in the order of the schedule")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(f"train_sampling_strategy {args.train_sampling_strategy!r} would undo the schedule")
    settings = args.accelerator_config
    for name in ("dispatch_batches", "split_batches"):
        if getattr(settings, name, None):
            raise ValueError(f"accelerator_config.{name} is not supported: it changes what a step sees")


def _check_steps(most: int, planned: list[str], global_batch: int) -> None:
    """Warn of what `max_steps` cuts off a plan; `ValueError` where it goes beyond: the run would begin it anew."""
    steps = len(planned) // global_batch
    if most > steps:
        raise ValueError(f"max_steps is {most}, and the plan has {steps} steps: set num_train_epochs")
    if 0 < most < steps:
        never = len({*planned} - {*planned[: most * global_batch]})
        logger.warning(
            f"max_steps ends the run after {most} of the {steps} planned steps: {never} of {len({*planned})} samples "
            "are never trained on"
        )


def _tell_objective(
    trainer_class: type[Trainer], scores: DifficultyScores | None, values: dict[str, np.ndarray], metric: str | None
) -> None:
    """Warn of scores that were calibrated with another objective than the trainer's, by its name."""
    if scores is None or not values:
        return
    read = {metric or scores.metrics[0] if name == "difficulty" else name for name in values}
    objective = scores.calibrated_for(read)
    if objective not in (None, trainer_class.__name__.lower()):
        logger.warning(
            f"the difficulty scores were calibrated with objective {objective!r}; {trainer_class.__name__} has a loss "
            "of its own: what is hard for one need not be hard for the other"
        )


def _ids(dataset: Any, ids: Sequence[str] | None, processing_class: Any) -> list[str]:
    if ids is not None:
        names = [str(name) for name in ids]
        if len(names) != len(dataset):
            raise ValueError(f"ids are {len(names)} for {len(dataset)} samples")
    else:
        columns = getattr(dataset, "column_names", None) or []
        column = id_column(columns)
        if column is not None:
            names = [str(name) for name in dataset[column]]
        elif processing_class is not None and any(all(c in columns for c in needed) for needed in FORMATS.values()):
            names = sample_ids(dataset, processing_class, name="training")
        else:
            raise ValueError(
                "the training samples have no ids to join difficulty by: give ids, or a column sample_id or id"
            )
    if len(set(names)) < len(names):
        raise ValueError("the ids of the training samples are not distinct")
    return names


def _difficulty(
    scores: DifficultyScores | None, names: list[str], parts: list[Any], metric: str | None
) -> dict[str, np.ndarray]:
    needed = {name for part in parts for name in part.metrics}
    if not needed:
        return {}
    if scores is None:
        raise ValueError(f"schedule {'+'.join(part.name for part in parts)!r} needs difficulty scores: give difficulty")
    scores = scores.aligned(names)
    values = {name: scores[name] for name in needed - {"difficulty"}}
    if "difficulty" in needed:
        values["difficulty"] = scores[metric or scores.metrics[0]]
    return values

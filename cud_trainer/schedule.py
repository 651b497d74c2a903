"""From difficulty to what is trained when, and how strongly: a `Schedule` is data made by pure functions.

The whole run is one pass over `Schedule.order`, served sequentially. Unlike a custom sampler, rows of a dataset stay
exact under gradient accumulation, several processes, dataloader workers and resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .files import atomic_write, check_new_file
from .options import check_known, check_numbers, keyword_options

METADATA_KEY = b"cud_trainer"


@dataclass(frozen=True)
class Schedule:
    """What is trained, in order.

    Attributes:
        name: of the schedule.
        order: forget sample ids in the order they are served, `[passes * N]`.
        weight: weight of each served sample, float64 `[passes * N]`; mean 1 over every pass.
        retain_id: the retain sample paired with each, `[passes * N]`, or `None` without a retain set.
        settings: name, options, seed and passes.
    """

    name: str
    order: np.ndarray
    weight: np.ndarray
    retain_id: np.ndarray | None
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def hash(self) -> str:
        """16 hex digits: equal for equal order, weights and retain partners."""
        digest = hashlib.sha256("\n".join(self.order.tolist()).encode())
        digest.update(np.ascontiguousarray(self.weight, dtype="<f8").tobytes())
        if self.retain_id is not None:
            digest.update("\n".join(self.retain_id.tolist()).encode())
        return digest.hexdigest()[:16]

    def rows(self, forget_ids: Sequence[str], retain_ids: Sequence[str] | None, global_batch: int) -> dict[str, list]:
        """Columns of the training dataset, one row per pair; the length is a multiple of `global_batch`.

        The last batch is filled up with rows of weight 0 (`row` = -1), and its real rows are scaled up by the same
        share: the mean over every global batch, in whatever micro-batches, is the weighted mean over its real rows.
        """
        forget_position = {sample_id: index for index, sample_id in enumerate(forget_ids)}
        count = len(self)
        padding = -count % global_batch
        last = count - (global_batch - padding) if padding else count
        scale = np.ones(count)
        scale[last:] = global_batch / (global_batch - padding) if padding else 1.0
        retain_index = np.zeros(count, dtype=int)
        if self.retain_id is not None and retain_ids is not None:
            retain_position = {sample_id: index for index, sample_id in enumerate(retain_ids)}
            retain_index = np.array([retain_position[sample_id] for sample_id in self.retain_id.tolist()])
        forget_index = np.array([forget_position[sample_id] for sample_id in self.order.tolist()])

        def filled(values: np.ndarray, fill: float) -> list:
            return np.concatenate([values, np.full(padding, fill, dtype=values.dtype)]).tolist()

        return {
            "row": filled(np.arange(count), -1),
            "forget_index": filled(forget_index, int(forget_index[0])),
            "retain_index": filled(retain_index, int(retain_index[0])),
            "weight": filled(self.weight * scale, 0.0),
            "retain_scale": filled(scale, 0.0),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a parquet file (`forget_id`, `retain_id`, `weight`), atomically; `ValueError` if it exists."""
        check_new_file(path, overwrite)
        columns: dict[str, Any] = {"forget_id": self.order.tolist(), "weight": self.weight}
        if self.retain_id is not None:
            columns["retain_id"] = self.retain_id.tolist()
        header = {"name": self.name, "settings": self.settings, "hash": self.hash}
        table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(header).encode()})
        return atomic_write(path, lambda temporary: pq.write_table(table, temporary))

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read what `save` wrote; `ValueError` for a missing, foreign or altered file."""
        try:
            table = pq.read_table(path)
            header = json.loads((table.schema.metadata or {})[METADATA_KEY])
            retain = table["retain_id"].to_pylist() if "retain_id" in table.column_names else None
            schedule = cls(
                header["name"],
                np.array(table["forget_id"].to_pylist()),
                table["weight"].to_numpy(),
                None if retain is None else np.array(retain),
                header["settings"],
            )
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise ValueError(f"cannot read a schedule from {path}: {error}") from None
        if schedule.hash != header["hash"]:
            raise ValueError(
                f"schedule {path} was altered: its hash is {schedule.hash}, its header says {header['hash']}"
            )
        return schedule


@dataclass(frozen=True)
class ScheduleSpec:
    """A registered schedule.

    Attributes:
        name: the name used in configs.
        plan: `(difficulty [N] | None, shuffled rows [N], **options) -> (order [N], weight [N])` of one pass; `weight`
            belongs to the sample, not to the position.
        metric: the difficulty metric it reads: a name, `"difficulty"` for the configured one, or `None`.
    """

    name: str
    plan: Callable[..., tuple[np.ndarray, np.ndarray]]
    metric: str | None = "difficulty"

    def check_options(self, given: dict[str, Any]) -> None:
        """Raise `ValueError` for an option this schedule does not have, or a value that is no number."""
        owner = f"schedule {self.name!r}"
        check_known(owner, self.plan, given)
        check_numbers(owner, given)
        options = {**keyword_options(self.plan), **given}
        if "low" in options and not 0 <= options["low"] <= 1 <= options["high"]:
            raise ValueError(f"{owner} needs 0 <= low <= 1 <= high, got {options['low']!r} and {options['high']!r}")
        if not 0 <= options.get("strength", 0) <= 1:
            raise ValueError(f"{owner} needs strength in [0, 1], got {options['strength']!r}")


SCHEDULES: dict[str, ScheduleSpec] = {}


def register_schedule(name: str, **properties: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the plan of one pass under `name`; `properties` are those of `ScheduleSpec`. `ValueError` if taken."""

    def register(plan: Callable[..., Any]) -> Callable[..., Any]:
        if name in SCHEDULES:
            raise ValueError(f"schedule {name!r} is already registered")
        SCHEDULES[name] = ScheduleSpec(name, plan, **properties)
        return plan

    return register


def get_schedule(name: str, options: dict[str, Any] | None = None) -> ScheduleSpec:
    """The registered schedule, its options checked; `ValueError` with the valid names or options."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {sorted(SCHEDULES)}")
    SCHEDULES[name].check_options(options or {})
    return SCHEDULES[name]


def make_schedule(
    name: str,
    forget_ids: Sequence[str],
    *,
    difficulty: np.ndarray | None = None,
    retain_ids: Sequence[str] | None = None,
    passes: int = 1,
    seed: int = 0,
    **options: Any,
) -> Schedule:
    """The plan of a whole run: a pure function of its arguments.

    Args:
        difficulty: one value per forget sample, higher = harder; required unless the schedule reads none.
        retain_ids: retain samples to pair, drawn without replacement by a generator of their own.
        passes: how often each forget sample is served.

    Raises:
        ValueError: for an unknown schedule or option, missing or non-finite difficulty, or `passes < 1`.
    """
    spec = get_schedule(name, options)
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"passes must be a positive integer, got {passes!r}")
    size = len(forget_ids)
    if size == 0 or len(set(forget_ids)) != size:
        raise ValueError("a schedule needs forget samples with distinct ids" if size else "there is no forget sample")
    if retain_ids is not None and len(retain_ids) == 0:
        raise ValueError("there is no retain sample to pair with")
    if spec.metric is not None:
        if difficulty is None:
            raise ValueError(f"schedule {name!r} needs difficulty scores")
        difficulty = np.asarray(difficulty, dtype=np.float64)
        if difficulty.shape != (size,) or not np.isfinite(difficulty).all():
            raise ValueError(f"schedule {name!r} needs one finite difficulty per forget sample ({size})")
        if spec.metric == "difficulty" and size > 1 and np.ptp(difficulty) == 0:
            raise ValueError(f"schedule {name!r} needs difficulty scores that differ; all are {difficulty[0]!r}")
    ids = np.array(list(forget_ids))
    orders, weights = [], []
    for number in range(passes):
        shuffled = np.random.default_rng([seed, 0, number]).permutation(size)
        order, weight = spec.plan(difficulty, shuffled, **options)
        orders.append(ids[order])
        weights.append(weight[order])
    settings = {"name": name, "options": options, "seed": seed, "passes": passes}
    return Schedule(
        name,
        np.concatenate(orders),
        np.concatenate(weights),
        _partners(retain_ids, size * passes, seed),
        settings,
    )


def _partners(retain_ids: Sequence[str] | None, count: int, seed: int) -> np.ndarray | None:
    """Retain samples in random order, all of them before any comes again."""
    if retain_ids is None:
        return None
    ids = np.array(list(retain_ids))
    rounds = -(-count // len(ids))
    drawn = [np.random.default_rng([seed, 1, number]).permutation(len(ids)) for number in range(rounds)]
    return ids[np.concatenate(drawn)[:count]]


def scaled_to_mean_one(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`clip(c * values, low, high)` with the factor `c` for which the mean is 1.

    Args:
        values: positive, `[N]`.
        low, high: with `low <= 1 <= high`.
    """
    log_values = np.log(values)
    high = min(high, len(values))  # no weight can be larger while the mean is 1; `high` may be infinite
    # The mean grows with c, from `low` where the largest value is cut to `high` where the smallest is.
    small = np.log(max(low, 1e-12)) - log_values.max()
    large = np.log(high) - log_values.min()
    for _ in range(200):
        middle = (small + large) / 2
        if np.clip(np.exp(log_values + middle), low, high).mean() < 1:
            small = middle
        else:
            large = middle
    return np.clip(np.exp(log_values + large), low, high)


def _rank(difficulty: np.ndarray) -> np.ndarray:
    """Rank in [0, 1], mean 0.5; ties share their mean rank."""
    from scipy.stats import rankdata

    if len(difficulty) == 1:
        return np.array([0.5])
    return (rankdata(difficulty) - 1) / (len(difficulty) - 1)


@register_schedule("uniform", metric=None)
def uniform(difficulty: np.ndarray | None, shuffled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random order, equal weights."""
    return shuffled, np.ones(len(shuffled))


@register_schedule("inverse_mass", metric="circuit_mass")
def inverse_mass(
    difficulty: np.ndarray, shuffled: np.ndarray, *, low: float = 0.25, high: float = 6.0
) -> tuple[np.ndarray, np.ndarray]:
    """Random order, weight proportional to 1 / circuit mass, clipped to [low, high], mean 1.

    `difficulty` is `circuit_mass`, that is -log(mass): the weight is proportional to its exponential.
    """
    # Shifted so that nothing overflows; the factor is fixed by the mean.
    return shuffled, scaled_to_mean_one(np.exp(difficulty - difficulty.max()).clip(min=1e-300), low, high)


@register_schedule("upweight_hard")
def upweight_hard(
    difficulty: np.ndarray, shuffled: np.ndarray, *, strength: float = 0.75
) -> tuple[np.ndarray, np.ndarray]:
    """Random order, weight linear in the rank: `1 - strength` for the easiest to `1 + strength` for the hardest."""
    return shuffled, 1 + strength * (2 * _rank(difficulty) - 1)


@register_schedule("upweight_easy")
def upweight_easy(
    difficulty: np.ndarray, shuffled: np.ndarray, *, strength: float = 0.75
) -> tuple[np.ndarray, np.ndarray]:
    """Random order, weight linear in the rank: `1 + strength` for the easiest to `1 - strength` for the hardest."""
    return shuffled, 1 - strength * (2 * _rank(difficulty) - 1)


@register_schedule("easy_to_hard")
def easy_to_hard(difficulty: np.ndarray, shuffled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pass from the easiest to the hardest sample, ties in random order; equal weights."""
    return shuffled[np.argsort(difficulty[shuffled], kind="stable")], np.ones(len(shuffled))


@register_schedule("hard_to_easy")
def hard_to_easy(difficulty: np.ndarray, shuffled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pass from the hardest to the easiest sample, ties in random order; equal weights."""
    return shuffled[np.argsort(-difficulty[shuffled], kind="stable")], np.ones(len(shuffled))

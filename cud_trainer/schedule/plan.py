"""From difficulty to what is trained when, and how strongly: a `Schedule` is data made by pure functions.

The whole run is one pass over `Schedule.order`, served sequentially. Unlike a custom sampler, rows of a dataset stay
exact under gradient accumulation, several processes, dataloader workers and resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.ids import IdKey, keyed_for, keys_beside
from ..files import check_new_file, read_parquet, write_parquet
from .orders import OnePass
from .registry import ScheduleRule, parse


@dataclass(frozen=True)
class Schedule:
    """What is trained, in order.

    Attributes:
        name: of the schedule.
        order: forget sample ids in the order they are served, `[passes * N]`; an array of objects, one for each sample.
        weight: weight of each served sample, float64 `[passes * N]`; mean 1 over every pass.
        retain_id: the retain sample paired with each, `[passes * N]`, or `None` without a retain set.
        settings: name, options, seed and passes.
        dynamic: parts whose weights follow the run, with their options; they multiply `weight` (see
            `cud_trainer.schedule.DynamicWeights`).
        values: metrics that those parts read, by name, `[N]` each, in the order of the forget samples.
        retain_weight: weight of each retain partner, float64 `[passes * N]`; `None` for equal ones.
        keys: that the ids may be made with, where they come from a file (`cud_trainer.data.ids`).

    With `budget`, or an order that repeats samples, `passes * N` is what it comes to about.
    """

    name: str
    order: np.ndarray
    weight: np.ndarray
    retain_id: np.ndarray | None
    settings: dict[str, Any] = field(default_factory=dict)
    dynamic: tuple[tuple[str, dict[str, Any]], ...] = ()
    values: dict[str, np.ndarray] = field(default_factory=dict)
    retain_weight: np.ndarray | None = None
    keys: tuple[IdKey, ...] = field(default=(), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def hash(self) -> str:
        """16 hex digits: equal for equal order, weights and retain partners."""
        digest = hashlib.sha256("\n".join(self.order.tolist()).encode())
        digest.update(np.ascontiguousarray(self.weight, dtype="<f8").tobytes())
        if self.retain_id is not None:
            digest.update("\n".join(self.retain_id.tolist()).encode())
        if self.dynamic:
            digest.update(json.dumps(self.dynamic, sort_keys=True).encode())
        if self.values:
            digest.update(json.dumps(self._values(), sort_keys=True).encode())
        if self.retain_weight is not None:
            digest.update(np.ascontiguousarray(self.retain_weight, dtype="<f8").tobytes())
        return digest.hexdigest()[:16]

    def _values(self) -> dict[str, list[float]]:
        """As plain JSON values, which hold float64 exactly."""
        return {name: np.asarray(column).tolist() for name, column in self.values.items()}

    def rows(
        self,
        forget_ids: Sequence[str],
        retain_ids: Sequence[str] | None,
        global_batch: int,
        *,
        forget_lengths: np.ndarray | None = None,
        retain_lengths: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Columns of the training dataset, one row per pair; the length is a multiple of `global_batch`.

        The last batch is filled up with rows of weight 0 (`row` = -1), and its real rows are scaled up by the same
        share: the mean over every global batch, in whatever micro-batches, is the weighted mean over its real rows.

        Args:
            forget_lengths: answer tokens of each forget sample. If given, that mean is one over tokens:
                `sum w_i n_i L_i / sum w_i n_i` for a loss L that is itself a mean over the tokens of a sample.
            retain_lengths: the same of the retain samples.
        """
        forget_position = {sample_id: index for index, sample_id in enumerate(forget_ids)}
        count = len(self)
        padding = -count % global_batch
        last = count - (global_batch - padding) if padding else count
        scale = np.ones(count)
        scale[last:] = global_batch / (global_batch - padding) if padding else 1.0
        retain_index = np.zeros(count, dtype=np.int64)
        if self.retain_id is not None and retain_ids is not None:
            retain_position = {sample_id: index for index, sample_id in enumerate(retain_ids)}
            retain_index = np.fromiter((retain_position[sample_id] for sample_id in self.retain_id), np.int64, count)
        forget_index = np.fromiter((forget_position[sample_id] for sample_id in self.order), np.int64, count)
        retain_weight = np.ones(count) if self.retain_weight is None else self.retain_weight
        weight, retain_scale = self.weight * scale, retain_weight * scale
        batch = np.arange(count) // global_batch
        if forget_lengths is not None:
            weight = _by_tokens(self.weight, np.asarray(forget_lengths)[forget_index], batch, global_batch)
        if retain_lengths is not None:
            lengths = np.asarray(retain_lengths)[retain_index]
            # The weights scale the mean over tokens, they do not cancel in it: their own mean is not 1.
            retain_scale = _by_tokens(np.ones(count), lengths, batch, global_batch) * retain_weight

        def filled(values: np.ndarray, fill: float) -> np.ndarray:
            return np.concatenate([values, np.full(padding, fill, dtype=values.dtype)])

        return {
            "row": filled(np.arange(count), -1),
            "forget_index": filled(forget_index, int(forget_index[0])),
            "retain_index": filled(retain_index, int(retain_index[0])),
            "weight": filled(weight, 0.0),
            "retain_scale": filled(retain_scale, 0.0),
        }

    def weight_within_batches(self, global_batch: int) -> float:
        """Share of the variance of the weights that lies within global batches, in [0, 1]; NaN for equal weights.

        Clipping and Adam divide by the size of a batch's gradient: weights that only differ between batches come to
        nothing.
        """
        total = float(np.var(self.weight))
        if total < 1e-12:
            return float("nan")
        parts = [self.weight[start : start + global_batch] for start in range(0, len(self), global_batch)]
        return float(sum(len(part) * np.var(part) for part in parts) / len(self) / total)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a parquet file, a row for each served sample, atomically; `ValueError` if it exists.

        Columns: `forget_id`, `weight`, and with a retain set `retain_id`, with weights of its own `retain_weight`.
        """
        check_new_file(path, overwrite)
        ids = list(dict.fromkeys([*self.order, *([] if self.retain_id is None else self.retain_id)]))
        written = self._named(dict(zip(ids, keyed_for(path, ids, self.keys), strict=True)))
        columns: dict[str, Any] = {"forget_id": written.order, "weight": self.weight}
        if written.retain_id is not None:
            columns["retain_id"] = written.retain_id
        if self.retain_weight is not None:
            columns["retain_weight"] = self.retain_weight
        header = {"name": self.name, "settings": self.settings, "hash": written.hash, "dynamic": self.dynamic}
        if self.values:
            header["values"] = self._values()
        return write_parquet(path, pa.table(columns), header)

    def _named(self, names: Mapping[str, str]) -> Schedule:
        """The same with other names for the samples."""
        order = array_of(map(names.__getitem__, self.order))
        retain = None if self.retain_id is None else array_of(map(names.__getitem__, self.retain_id))
        return replace(self, order=order, retain_id=retain)

    def keyed(self, key: IdKey) -> Schedule:
        """As it stands in a file, with ids of this key."""
        ids = list(dict.fromkeys([*self.order, *([] if self.retain_id is None else self.retain_id)]))
        return self._named(dict(zip(ids, key.keyed_values(ids), strict=True)))

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read what `save` wrote; `ValueError` for a missing, foreign or altered file."""
        table, header = read_parquet(path, "a schedule")
        try:
            retain = _read_ids(table["retain_id"]) if "retain_id" in table.column_names else None
            schedule = cls(
                header["name"],
                _read_ids(table["forget_id"]),
                table["weight"].to_numpy(),
                retain,
                header["settings"],
                tuple((name, options) for name, options in header.get("dynamic", [])),
                {name: np.array(column, dtype=np.float64) for name, column in header.get("values", {}).items()},
                table["retain_weight"].to_numpy() if "retain_weight" in table.column_names else None,
                keys_beside(path),
            )
            actual, recorded = schedule.hash, header["hash"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # columns or entries of another kind
            raise ValueError(f"cannot read a schedule from {path}: {type(error).__name__}: {error}") from None
        if actual != recorded:
            raise ValueError(f"schedule {path} was altered: its hash is {actual}, its header says {recorded}")
        return schedule


def make_schedule(
    name: str,
    forget_ids: Sequence[str],
    *,
    difficulty: np.ndarray | Mapping[str, np.ndarray] | None = None,
    retain_ids: Sequence[str] | None = None,
    passes: int = 1,
    seed: int = 0,
    **options: Any,
) -> Schedule:
    """The plan of a whole run: a pure function of its arguments.

    Args:
        name: a registered schedule, or several joined by `+`: at most one order, one set of weights, and any number of
            dynamic ones (`"easy_to_hard+inverse_mass+per_sample_stop"`).
        difficulty: one value per forget sample, higher = harder; required unless the schedule reads none. A mapping
            gives the metrics by name, the configured one as `"difficulty"`.
        retain_ids: retain samples to pair, drawn without replacement by a generator of their own.
        passes: how often each forget sample is served.
        options: of the schedule; of each part by its name, where there are several.

    Raises:
        ValueError: for an unknown schedule or option, missing or non-finite difficulty, or `passes < 1`.
    """
    return schedule_of(
        parse(name, options),
        name,
        forget_ids,
        difficulty=difficulty,
        retain_ids=retain_ids,
        passes=passes,
        seed=seed,
        options=options,
    )


def schedule_of(
    parts: Sequence[tuple[ScheduleRule, dict[str, Any]]],
    name: str,
    forget_ids: Sequence[str],
    *,
    difficulty: np.ndarray | Mapping[str, np.ndarray] | None,
    retain_ids: Sequence[str] | None,
    passes: int,
    seed: int,
    options: dict[str, Any],
    neighbours: np.ndarray | None = None,
) -> Schedule:
    """`make_schedule` for what `parse` made of `name` and `options` already.

    Args:
        neighbours: retain partners of each forget sample, as positions in `retain_ids`, int `[N, k]`: those of a sample
            in turn, one after the other each time that it is served; by default they are drawn.
    """
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"passes must be a positive integer, got {passes!r}")
    size = len(forget_ids)
    if size == 0 or len(set(forget_ids)) != size:
        raise ValueError("a schedule needs forget samples with distinct ids" if size else "there is no forget sample")
    if retain_ids is not None and len(retain_ids) == 0:
        raise ValueError("there is no retain sample to pair with")
    values = {part.name: [_difficulty(part, metric, difficulty, size) for metric in part.metrics] for part, _ in parts}
    order, order_options = next((entry for entry in parts if entry[0].kind == "order"), (None, {}))
    weight, retain_weight = np.ones(size), None
    for part, part_options in parts:
        if part.kind == "weights":
            weight = part.function(*values[part.name], **part_options)
            if part.weighs_retain:
                weight, retain_weight = weight
    orders, weights = [], []
    for number in range(passes):
        turn = OnePass(number, passes, size, seed)
        rows = turn.shuffled
        if order is not None:
            read: list[Any] = [*values[order.name]] or [None]
            rows = order.function(*read, turn, **order_options)
        orders.append(rows)
        served = weight[rows]
        # an order that serves some samples more often than others would shift the mean
        weights.append(served if len(set(rows.tolist())) == len(rows) == size else served / served.mean())
    order_of_rows = np.concatenate(orders)
    settings = {"name": name, "options": options, "seed": seed, "passes": passes}
    if neighbours is not None:
        settings["retain_pairing"] = "nearest"
    following = [(part, part_options) for part, part_options in parts if part.kind == "dynamic"]
    return Schedule(
        name,
        array_of(forget_ids)[order_of_rows],
        np.concatenate(weights),
        _partners(retain_ids, len(order_of_rows), seed)
        if neighbours is None or retain_ids is None
        else array_of(retain_ids)[_in_turn(neighbours, order_of_rows)],
        settings,
        tuple((part.name, dict(part_options)) for part, part_options in following),
        {name: column for part, _ in following for name, column in zip(part.metrics, values[part.name], strict=True)},
        None if retain_weight is None else retain_weight[order_of_rows],
    )


def array_of(ids: Iterable[str]) -> np.ndarray:
    """Ids as an array of objects, which are shared by all its copies; one of texts would be as wide as the longest."""
    ids = [str(name) for name in ids]
    array = np.empty(len(ids), dtype=object)
    array[:] = ids
    return array


def _read_ids(column: pa.ChunkedArray) -> np.ndarray:
    """The ids in a column of a file, each of them in memory once."""
    coded = column.combine_chunks().dictionary_encode()
    if isinstance(coded, pa.ChunkedArray):
        coded = coded.unify_dictionaries().combine_chunks()
    names = coded.dictionary.to_pylist()
    if not all(isinstance(name, str) for name in names) or coded.null_count:
        raise ValueError("an id is no text")
    return array_of(names)[coded.indices.to_numpy(zero_copy_only=False)]


def _difficulty(part: ScheduleRule, metric: str, difficulty: Any, size: int) -> np.ndarray:
    """What `part` reads of one metric, checked."""
    values = difficulty.get(metric) if isinstance(difficulty, Mapping) else difficulty
    if values is None:
        raise ValueError(f"schedule {part.name!r} needs {metric} scores")
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise ValueError(f"schedule {part.name!r} needs one finite difficulty per forget sample ({size})")
    if metric == "difficulty" and size > 1 and np.ptp(values) == 0:
        raise ValueError(f"schedule {part.name!r} needs difficulty scores that differ; all are {values[0]!r}")
    return values


def _by_tokens(weight: np.ndarray, lengths: np.ndarray, batch: np.ndarray, global_batch: int) -> np.ndarray:
    """Row weights whose mean over a global batch (padding included) is the mean over its tokens."""
    mass = weight * lengths
    total = np.bincount(batch, mass)[batch]
    return mass * global_batch / np.where(total > 0, total, 1.0)


def _partners(retain_ids: Sequence[str] | None, count: int, seed: int) -> np.ndarray | None:
    """Retain samples in random order, all of them before any comes again."""
    if retain_ids is None:
        return None
    ids = array_of(retain_ids)
    rounds = -(-count // len(ids))
    drawn = [np.random.default_rng([seed, 1, number]).permutation(len(ids)) for number in range(rounds)]
    return ids[np.concatenate(drawn)[:count]]


def _in_turn(neighbours: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Of each served row, the next of its neighbours; after the last the first again."""
    served = np.zeros(len(neighbours), dtype=int)
    partners = np.empty(len(order), dtype=int)
    for place, row in enumerate(order.tolist()):
        partners[place] = neighbours[row, served[row] % neighbours.shape[1]]
        served[row] += 1
    return partners

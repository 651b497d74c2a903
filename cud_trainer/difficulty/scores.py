"""The difficulty table: one row per forget sample, with where it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset
from transformers.utils import logging

from ..data import id_column, rows_by_id
from ..data.ids import IdKey, keyed_for, keys_beside
from ..files import atomic_write, check_new_file, read_parquet, write_parquet
from .buckets import Buckets
from .exchange import TABLES, read_published, read_table, write_table
from .registry import METRICS

logger = logging.get_logger(__name__)

RESERVED = ("sample_id", "fold", "bucket")
FORMAT_VERSION = 1
# A metric whose name has meant another thing, and what provenance says of it since it means this.
PAPER, AS_PUBLISHED = "cud_paper", "as published"
PRECOMPUTED = "given"  # as a metric: the first one of scores that were made before


@dataclass
class DifficultyScores:
    """Difficulty of forget samples under one or more metrics; higher = harder. Holds no text.

    Attributes:
        ids: sample ids, `[N]`, unique.
        columns: metric name -> float64 `[N]`, all finite; the first is the primary metric.
        fold: cross-fitting fold of each sample, int `[N]`, or `None`.
        provenance: fingerprints of model and dataset, metric settings, versions, seed.
        keys: that the ids may be made with, where they come from a file (`cud_trainer.data.ids`).

    Raises:
        ValueError: when lengths differ, ids repeat, or a score is not finite (named by sample and metric).
    """

    ids: list[str]
    columns: dict[str, np.ndarray]
    fold: np.ndarray | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    keys: tuple[IdKey, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        self.ids = [str(sample_id) for sample_id in self.ids]
        if len(set(self.ids)) != len(self.ids):
            repeated = Counter(self.ids).most_common(1)[0][0]
            raise ValueError(f"difficulty scores have the id {repeated!r} more than once")
        if not self.columns:
            raise ValueError("difficulty scores need at least one metric")
        self.columns = dict(self.columns)
        for name, values in self.columns.items():
            if name in RESERVED:
                raise ValueError(f"a difficulty metric cannot be called {name!r}: the table has a column of that name")
            values = np.asarray(values, dtype=np.float64)
            if values.shape != (len(self.ids),):
                raise ValueError(f"metric {name!r} has {values.size} values for {len(self.ids)} samples")
            broken = np.flatnonzero(~np.isfinite(values))
            if broken.size:
                raise ValueError(
                    f"metric {name!r} is not finite for {broken.size} of {len(self.ids)} samples, "
                    f"the first is {self.ids[broken[0]]!r}"
                )
            self.columns[name] = values
        if self.fold is not None:
            self.fold = np.asarray(self.fold)
            if self.fold.shape != (len(self.ids),):
                raise ValueError(f"there are {self.fold.size} folds for {len(self.ids)} samples")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, metric: str) -> np.ndarray:
        if metric not in self.columns:
            raise ValueError(f"no difficulty metric {metric!r} in these scores; they have {list(self.columns)}")
        return self.columns[metric]

    @property
    def metrics(self) -> list[str]:
        return list(self.columns)

    @property
    def constant(self) -> list[str]:
        """Metrics that are the same for all of several samples, and so rank nothing."""
        return [name for name, values in self.columns.items() if len(values) > 1 and np.ptp(values) == 0]

    def aligned(self, ids: Sequence[str], of: str = "forget") -> DifficultyScores:
        """The rows for `ids`, of the set `of`, in that order; `ValueError` naming an id that has no score."""
        rows = rows_by_id(self.ids, ids, "difficulty scores", f"{of} samples", self.keys)
        fold = None if self.fold is None else self.fold[rows]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return DifficultyScores(list(ids), columns, fold, self.provenance, self.keys)

    def with_given(self) -> DifficultyScores:
        """The same with the primary metric under the name `"given"`, too, in front."""
        columns = {PRECOMPUTED: self[self.metrics[0]], **self.columns}
        return DifficultyScores(self.ids, columns, self.fold, self.provenance, self.keys)

    def buckets(self, metric: str | None = None, n: int = 4) -> np.ndarray:
        """Equal-count bucket of each sample by rank, 0 (easiest) to `n - 1` (hardest), int `[N]` (`Buckets.by_rank`).

        Raises:
            ValueError: with fewer samples than buckets, or for a metric that is the same for all samples.
        """
        return self.bucketed(metric, n).number

    def bucketed(self, metric: str | None = None, n: int = 4) -> Buckets:
        """`buckets` with what belongs to them: how many, by which metric (default: the primary), who is in each."""
        name = metric or self.metrics[0]
        return Buckets.by_rank(self[name], n, name)

    def check_provenance(self, **expected: Any) -> None:
        """Raise `ValueError` listing every entry of `expected` that the scores were made with another value of.

        Entries the scores say nothing about (for example, imported ones) are not compared.
        """
        differs = [
            difference
            for key, value in expected.items()
            if key in self.provenance
            and self.provenance[key] not in (value, *(one.keyed_values(value) for one in self.keys))
            for difference in _differences(key, self.provenance[key], value)
        ]
        if differs:
            raise ValueError("difficulty scores belong to something else: " + "; ".join(differs))

    def calibrated_for(self, names: Iterable[str]) -> str | None:
        """The objective whose calibration run any of the metrics `names` was made with; `None` where none was."""
        made = (METRICS.get(name) for name in names)
        reads = any(metric is not None and (metric.cross_fitted or metric.name == "calibration") for metric in made)
        recorded = self.provenance.get("calibration")
        return str(recorded["objective"]) if reads and isinstance(recorded, dict) and "objective" in recorded else None

    def to_pandas(self) -> pd.DataFrame:
        """Columns `sample_id`, one per metric, `fold`, `bucket` (1 = easiest; of the primary, if it ranks)."""
        frame = pd.DataFrame({"sample_id": self.ids, **self.columns})
        if self.fold is not None:
            frame["fold"] = self.fold
        if self.metrics[0] not in self.constant:
            frame["bucket"] = self.buckets(n=min(4, len(self.ids))) + 1
        return frame

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a parquet file (readable by `datasets` and pandas), atomically; `ValueError` if it exists.

        A path that ends in `.csv` or `.jsonl` gets a table of that kind; these have no place for the provenance.
        Hashes of contents become keyed ids, with the key beside the file (`cud_trainer.data.ids`).
        """
        check_new_file(path, overwrite)
        suffix = Path(path).suffix.lower()
        if suffix in TABLES:
            frame = self.to_pandas().assign(sample_id=keyed_for(path, self.ids, self.keys))
            return atomic_write(path, lambda temporary: write_table(frame, temporary, suffix), private=True)
        ids, provenance = keyed_for(path, self.ids, self.keys), keyed_for(path, self.provenance)
        table = pa.Table.from_pandas(self.to_pandas().assign(sample_id=ids), preserve_index=False)
        header = {"format": FORMAT_VERSION, "metrics": self.metrics, "provenance": provenance}
        return write_parquet(path, table, header)

    @classmethod
    def load(cls, path: str | Path, **expected: Any) -> DifficultyScores:
        """Read what `save` wrote; `expected` provenance is checked.

        From `.csv` and `.jsonl`, every column of numbers but `fold` and `bucket` is a metric, the first the primary.

        Raises:
            ValueError: for a missing or foreign file, or when the provenance differs.
        """
        if Path(path).suffix.lower() in TABLES:
            frame = read_table(Path(path))
            names = [name for name in frame.columns if name not in RESERVED]
            columns = {name: frame[name].to_numpy(dtype=float) for name in names}
            fold = frame["fold"].to_numpy(dtype=float) if "fold" in frame else None
            if fold is not None and (fold != np.floor(fold)).any():  # NaN, too
                raise ValueError(f"column 'fold' of {path} holds no whole numbers")
            fold = None if fold is None else fold.astype(int)
            return cls._read(path, frame["sample_id"].tolist(), columns, fold, {})
        table, header = read_parquet(path, "difficulty scores")
        if header.get("format") != FORMAT_VERSION:
            raise ValueError(f"{path} has format {header.get('format')}, this version reads {FORMAT_VERSION}")
        listed, provenance = header.get("metrics"), header.get("provenance")
        if not isinstance(listed, list) or not isinstance(provenance, dict):
            raise ValueError(f"{path} holds no difficulty scores: metrics or provenance are missing in its header")
        for name in ["sample_id", *listed]:
            if name not in table.column_names or table[name].null_count:
                raise ValueError(f"{path} has no column {name!r}, or one with gaps; it has {table.column_names}")
            kind = table[name].type
            if name != "sample_id" and not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
                raise ValueError(f"column {name!r} of {path} holds no numbers")
        columns = {name: table[name].to_numpy() for name in listed}
        fold = table["fold"].to_numpy() if "fold" in table.column_names else None
        scores = cls._read(path, table["sample_id"].to_pylist(), columns, fold, provenance)
        scores.check_provenance(**expected)
        if PAPER in columns and provenance.get(PAPER) != AS_PUBLISHED and "circuits" in provenance:
            logger.warning(
                f"{PAPER} in {path} is the form that is called cud_top_k now (200 strongest edges): an earlier version "
                "computed it"
            )
        return scores

    @classmethod
    def _read(
        cls,
        path: str | Path,
        ids: list[str],
        columns: dict[str, np.ndarray],
        fold: np.ndarray | None,
        provenance: dict[str, Any],
    ) -> DifficultyScores:
        """From what stands in a file; an error names it."""
        try:
            return cls(ids, columns, fold, provenance, keys_beside(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def published(
        cls,
        source: str | Path | Mapping[str, str | Path],
        ids: Sequence[str],
        *,
        name: str = "published",
        higher: str = "harder",
    ) -> DifficultyScores:
        """Scores of another project (`.pt`, `.json`, `.txt`, `.csv`) for the samples `ids`; see `read_published`."""
        ids = list(map(str, ids))
        columns = read_published(source, ids, name=name, higher=higher)
        files = list(source.values()) if isinstance(source, Mapping) else [source]
        return cls(ids, columns, provenance={"source": ", ".join(Path(path).name for path in files)})

    def join(self, dataset: Dataset, ids: Sequence[str] | None = None) -> Dataset:
        """`dataset` with a column `difficulty_<metric>` for every metric.

        Args:
            ids: of its samples, in its order; by default its column `sample_id` or `id`.

        Raises:
            ValueError: for samples without an id or a score, or a column that is there already.
        """
        if ids is None:
            column = id_column(dataset.column_names)
            if column is None:
                raise ValueError(f"the dataset has no column sample_id or id: give ids; it has {dataset.column_names}")
            ids = [str(value) for value in dataset[column]]
        if len(ids) != len(dataset):
            raise ValueError(f"ids are {len(ids)} for {len(dataset)} samples")
        rows = rows_by_id(self.ids, list(map(str, ids)), "difficulty scores", "samples", self.keys)
        for name, values in self.columns.items():
            if f"difficulty_{name}" in dataset.column_names:
                raise ValueError(f"the dataset has a column 'difficulty_{name}' already")
            dataset = dataset.add_column(f"difficulty_{name}", values[rows].tolist())  # type: ignore[call-arg]
        return dataset


def _differences(key: str, scores: Any, here: Any) -> list[str]:
    """In words; of two mappings, the entries that differ."""
    if isinstance(scores, dict) and isinstance(here, dict):
        names = sorted(name for name in {**scores, **here} if scores.get(name) != here.get(name))
        return [f"{key} {name}: scores {scores.get(name)!r}, here {here.get(name)!r}" for name in names]
    return [f"{key}: scores {scores!r}, here {here!r}"]


def merge_metrics(primary: str, names: Iterable[str]) -> list[str]:
    """Metric names without repeats, `primary` first."""
    return list(dict.fromkeys([primary, *names]))

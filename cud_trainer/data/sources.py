"""Data sets by hub id, folder or file."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.utils import logging as datasets_logging

from .columns import SECRET
from .readers import SUFFIXES, kind_of, read_file

# What lies in a folder beside its data.
BESIDE = re.compile(r"(readme|license|licence|citation|dataset_infos?\.json|\.|_)", re.IGNORECASE)
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "eval": "test"}
PART = re.compile(r"([a-z]+)([-_.]?\d+([-_]of[-_]\d+)?)?", re.IGNORECASE)
ROLES = ("forget", "retain", "holdout")

CACHE_PREFIX = "cud-data-"
STALE_SECONDS = 3600


def load_samples(
    source: str, name: str | None, split: str, limit: int | None, what: str, *, keep_cache: bool = False
) -> Dataset:
    """A dataset by hub id, folder or file, with its first `limit` samples; `ValueError` when it cannot be loaded.

    Text and ids of files are strings, whatever they look like. A text file is one document. The files of a folder are
    one dataset, unless they are called after splits.

    Args:
        keep_cache: leave the copy that `datasets` makes of parquet files, or of a folder with configurations, in its
            cache, readable as the umask says. By default it is made in a private folder, read into memory, and
            deleted. What comes from the hub lies in the caches of `huggingface_hub` and `datasets` as always.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"max_{what}_samples must be positive, got {limit}")
    path = Path(source).expanduser()
    pattern = any(mark in source for mark in "*?[") and not path.exists()
    try:
        with _cache((path.exists() or pattern) and not keep_cache) as options:
            if path.is_file():
                dataset = _file(path, options)
            elif path.is_dir():
                dataset = _folder(path, name, split, options)
            elif pattern:
                found = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]
                dataset = _files(found, source, options)
            elif path.suffix.lower() in (*SUFFIXES, ".gz") or source[:1] in ("/", "~", "."):
                raise ValueError(f"{what} dataset {source} does not exist")
            else:
                dataset = load_dataset(source, name, split=split)
    except Exception as error:  # datasets raises its own errors, those of its readers and those of the hub
        cause: BaseException = error  # what the reader said says more than "an error occurred"
        while cause.__cause__ is not None:
            cause = cause.__cause__
        named = "" if isinstance(cause, ValueError) else f"{type(cause).__name__}: "
        raise ValueError(f"cannot load the {what} dataset {source!r}: {named}{str(cause)[:500]}") from None
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return dataset


def renamed(dataset: Dataset, columns: Mapping[str, str], what: str, known: Mapping[str, Any]) -> Dataset:
    """A dataset whose columns are called as a format wants them.

    Args:
        columns: the column of the dataset by what it is to be called.
        known: the formats: their other columns are left out, so that there is one way to read the data.

    Raises:
        ValueError: for a column that is not there, or a name of no format.
    """
    if what != "forget" and columns.get(SECRET) not in dataset.column_names:  # only what is forgotten must name secrets
        columns = {target: column for target, column in columns.items() if target != SECRET}
    also = {"id", "sample_id", SECRET}
    wanted = {column for needed in known.values() for column in needed} | also
    for target, column in columns.items():
        if target not in wanted:
            raise ValueError(f"columns: {target!r} is no column of a format; choose from {sorted(wanted)}")
        if column not in dataset.column_names:
            raise ValueError(f"{what} dataset has no column {column!r}; it has {sorted(dataset.column_names)}")
    given = set(columns.values())
    ids = set() if {"id", "sample_id"} & set(columns) else {"id", "sample_id"}
    kept = ids if SECRET in columns else {*ids, SECRET}
    dropped = [column for column in dataset.column_names if column in wanted - kept and column not in given]
    dataset = dataset.remove_columns(dropped)
    return dataset.rename_columns({column: target for target, column in columns.items() if column != target})


def _file(path: Path, options: dict[str, Any]) -> Dataset:
    if path.stat().st_size and kind_of(path) == "parquet":
        with _silent_datasets():
            return load_dataset("parquet", data_files=str(path), split="train", **options)
    return read_file(path)


def _folder(path: Path, name: str | None, split: str, options: dict[str, Any]) -> Dataset:
    """A dataset that `save_to_disk` wrote, one with configurations as on the hub, or the files of a folder."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"it has no split {split!r}, but {sorted(saved)}")
        return saved[split]
    card = path / "README.md"
    if name is not None or (card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace")):
        return load_dataset(str(path), name, split=split, **options)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _beside(file.relative_to(path))]
    if not files:
        raise ValueError("the folder holds no data")
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    if all(splits.values()):
        files = [file for file in files if splits[file] == SPLITS.get(split, split)]
        if not files:
            raise ValueError(f"it has no split {split!r}, but {sorted(set(map(str, splits.values())))}")
    elif any(splits.values()):
        raise ValueError(f"some of its files are called after splits, others not: {_listed(files, path)}")
    elif split != "train":
        raise ValueError(f"it has no split {split!r}: its files are called after none ({_listed(files, path)})")
    return _files(files, str(path), options, path)


def _files(files: list[Path], source: str, options: dict[str, Any], root: Path | None = None) -> Dataset:
    """Several files as one dataset; `ValueError` listing them where it is not clear that they are one."""
    if not files:
        raise ValueError(f"no file is called {source}")
    kinds = {file: kind_of(file) or "unknown" for file in files}
    same = {"json" if kind == "json lines" else kind for kind in kinds.values()}
    listed = _listed(files, root)
    if "unknown" in same or len(same) > 1:
        raise ValueError(f"it holds files of several kinds, of which only some would be read: {listed}")
    roles = {tuple(role for role in ROLES if role in file.stem.lower()) for file in files}
    if len(roles) > 1:
        raise ValueError(f"its files are called after different sets; name the file that is meant: {listed}")
    parts = [_file(file, options) for file in files]
    for file, part in zip(files, parts, strict=True):
        if set(part.column_names) != set(parts[0].column_names):
            raise ValueError(
                f"its files have different columns: {files[0].name} has {sorted(parts[0].column_names)}, "
                f"{file.name} has {sorted(part.column_names)}"
            )
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _beside(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts) or bool(BESIDE.match(file.name))


def _split_of(file: Path) -> str | None:
    """The split that a file is called after, as on the hub: by its whole name or that of its folder."""
    first = file.name.split(".")[0]
    for name in (first, *file.parts[:-1]):
        match = PART.fullmatch(name)
        if match is not None and match[1].lower() in SPLITS:
            return SPLITS[match[1].lower()]
    return None


def _listed(files: list[Path], root: Path | None) -> str:
    names = [str(file.relative_to(root)) if root else file.name for file in files]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@contextmanager
def _cache(private: bool) -> Iterator[dict[str, Any]]:
    """Options of `load_dataset`: for a cache of its own that goes when it has loaded, if that is to be private."""
    if not private:
        yield {}
        return
    _remove_stale_caches()
    # `mkdtemp` makes it for this user alone.
    folder = tempfile.mkdtemp(prefix=CACHE_PREFIX)
    try:
        yield {"cache_dir": folder, "keep_in_memory": True}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale_caches() -> None:
    """Delete what processes of this user that were killed while they loaded have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{CACHE_PREFIX}*"):
        with suppress(OSError):
            mine = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
            # Process ids say nothing where containers share the folder; what is loading writes all the time.
            if mine and time.time() - _last_written(folder) > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """Its log repeats, in many lines, the error that it raises."""
    before = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(before)

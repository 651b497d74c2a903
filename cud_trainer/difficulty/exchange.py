"""Scores from and for other tools: CSV and JSONL tables, columns of a dataset, published score files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

TABLES = (".csv", ".jsonl")
VECTORS = ("score", "scores", "loss", "losses", "difficulty", "cud")  # what others call a vector of scores
FORMULA = re.compile(r"'*[=+\-@\t\r]")  # behind quotes: a text that had them before


def as_text_cell(text: str) -> str:
    """A cell of a CSV file that a spreadsheet shows as text: a quote goes before what it would compute."""
    return f"'{text}" if FORMULA.match(text) else text


def from_text_cell(text: str) -> str:
    """What `as_text_cell` was given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text[1:]) else text


def write_table(frame: pd.DataFrame, path: Path, suffix: str) -> None:
    """A table as text, numbers exact, and no text that a spreadsheet would take for a formula."""
    if suffix == ".csv":
        frame = frame.assign(sample_id=frame["sample_id"].map(as_text_cell)).rename(columns=as_text_cell)
        frame.to_csv(path, index=False, float_format="%.17g")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")), encoding="utf-8")


def read_table(path: Path) -> pd.DataFrame:
    """What `write_table` wrote, or any table with a column `sample_id` and columns of numbers.

    Raises:
        ValueError: naming the file, or the column that holds no numbers.
    """
    try:
        if path.suffix.lower() == ".csv":
            frame = _csv(path).rename(columns=from_text_cell)
            if "sample_id" in frame:
                frame["sample_id"] = frame["sample_id"].map(from_text_cell)
        else:
            frame = pd.DataFrame(_json_rows(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read difficulty scores from {path}: {str(error)[:300]}") from None
    if {"sample_id", "method", "easy_rank"} <= set(frame.columns):
        raise ValueError(f"{path} has a ranking for each method: read it with DifficultyScores.published")
    if "sample_id" not in frame or frame["sample_id"].isna().any() or (frame["sample_id"] == "").any():
        raise ValueError(f"{path} has no column sample_id, or one with gaps; it has {list(frame.columns)}")
    for column in frame.columns:
        if column != "sample_id" and frame[column].dtype == object:
            frame[column] = _numbers(frame[column], f"column {column!r} of {path}")
        elif column != "sample_id" and not pd.api.types.is_numeric_dtype(frame[column]):
            raise ValueError(f"column {column!r} of {path} holds no numbers")
    return frame.assign(sample_id=frame["sample_id"].astype(str))


def _csv(path: Path) -> pd.DataFrame:
    """A table of text, nothing in it taken for a gap: `NA` and `null` may be ids.

    Raises:
        ValueError: naming a column that is there twice.
    """
    names = pd.read_csv(path, dtype=str, keep_default_na=False, header=None, nrows=1).iloc[0].tolist()
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"it has the column {twice[0]!r} twice")
    return pd.read_csv(path, dtype=object, keep_default_na=False)


def _numbers(column: pd.Series, what: str) -> pd.Series:
    """What is written in a column, as numbers: exact, a gap as NaN."""
    try:
        return pd.Series([float(value) if value != "" else np.nan for value in column], column.index)
    except (TypeError, ValueError):
        raise ValueError(f"{what} holds no numbers") from None


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; `ValueError` naming the line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        for name, value in row.items():
            if isinstance(value, (dict, list)):
                raise ValueError(f"line {number}: {name!r} is no number")
        rows.append(row)
    return rows


def read_published(
    source: str | Path | Mapping[str, str | Path],
    ids: Sequence[str],
    *,
    name: str = "published",
    higher: str = "harder",
) -> dict[str, np.ndarray]:
    """Difficulty of `ids` from score files of another project: metric name -> `[N]`, higher = harder.

    - `.pt`, `.json`: a number per sample in the order of `ids` (a list or tensor, or a dictionary with one under a name
      of `VECTORS`), or a dictionary from id, or position, to number; nothing in a `.pt` is run;
    - `.json` `{"easy": [...], "hard": [...]}` (and `"metadata"`: `selected_samples.json` of CUD's authors),
      or `{"easy": path, "hard": path}` of two text files: 0, 1, and 0.5 for
      all others;
    - `.txt`: ids, or positions, on lines or between commas, from the easiest to the hardest; the score is the rank in
      [0, 1];
    - `.csv` with columns `method` and `order`: for every method the samples by loss after unlearning, lowest (hardest)
      first, as the authors of CUD publish them; a metric per method, the rank in [0, 1];
    - `.csv` with columns `method`, `sample_id` and `easy_rank` (1 for the easiest), their `ranked_scores.csv`: a metric
      per method, the rank in [0, 1]. Whether high or low scores are easy is in the ranks already.

    Args:
        name: of the metric, where the file has none.
        higher: `"harder"` or `"easier"`: what a larger number means there. Not for rankings and lists.

    Raises:
        ValueError: for an unreadable file, or one that does not fit the samples, naming what is missing.
    """
    if higher not in ("harder", "easier"):
        raise ValueError(f"higher must be 'harder' or 'easier', got {higher!r}")
    if isinstance(source, Mapping):
        if set(source) != {"easy", "hard"}:
            raise ValueError(f"files of easy and hard samples are {{'easy': ..., 'hard': ...}}, got {sorted(source)}")
        lists = {side: _text_ids(Path(path)) for side, path in source.items()}
        return {name: _sides(lists, ids, ", ".join(str(path) for path in source.values()))}
    path = Path(source)
    if path.suffix.lower() == ".txt":
        return {name: _ranks(_text_ids(path), ids, path)}
    if path.suffix.lower() == ".csv":
        try:
            table = _csv(path)
        except (OSError, ValueError, pd.errors.ParserError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        if {"method", "sample_id", "easy_rank"} <= set(table.columns):
            return _ranked(table, ids, path)
        if not {"method", "order"} <= set(table.columns) or (table[["method", "order"]] == "").any(axis=None):
            raise ValueError(f"{path} has no columns method and order, or gaps in them; it has {list(table.columns)}")
        return {
            str(method): 1 - _ranks(part["order"].tolist(), ids, path)
            for method, part in table.groupby("method", sort=False)
        }
    content = _load(path)
    if isinstance(content, Mapping) and set(content) - {"metadata"} == {"easy", "hard"}:
        return {name: _sides({side: content[side] for side in ("easy", "hard")}, ids, path)}
    vectors = [key for key in VECTORS if isinstance(content, Mapping) and key in content and key not in ids]
    if vectors:
        content = content[vectors[0]]
    if isinstance(content, Mapping):
        values = np.full(len(ids), np.nan)
        rows = _rows(list(content), ids, path)
        values[rows] = [_number(value, path) for value in content.values()]
        missing = np.flatnonzero(np.isnan(values))
        if missing.size:
            raise ValueError(f"{path} has no score for {missing.size} samples, the first is {ids[missing[0]]!r}")
    else:
        flat = content.float().numpy() if isinstance(content, torch.Tensor) else content
        flat = flat.reshape(-1) if isinstance(flat, np.ndarray) else flat
        if not isinstance(flat, (np.ndarray, list, tuple)):
            raise ValueError(f"{path} holds a {type(content).__name__}, no scores")
        values = np.array([_number(value, path) for value in flat])
        if len(values) != len(ids):
            raise ValueError(f"{path} has {len(values)} scores for {len(ids)} samples")
    return {name: values if higher == "harder" else -values}


def _rows(names: Sequence[Any], ids: Sequence[str], path: Any) -> list[int]:
    """Where ids, or else positions, stand."""
    position = {str(name): row for row, name in enumerate(ids)}
    rows = []
    for name in names:
        text = str(name).strip()
        if str(name) in position:
            rows.append(position[str(name)])
        elif text.isdecimal() and len(text) < 20 and int(text) < len(ids):
            rows.append(int(text))
        else:
            raise ValueError(f"{path} names {name!r}, which is neither a sample id nor a position below {len(ids)}")
    return rows


def _text_ids(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    return [part.strip() for line in text.splitlines() for part in line.split(",") if part.strip()]


def _ranks(names: Sequence[Any], ids: Sequence[str], path: Any) -> np.ndarray:
    """Rank in [0, 1] of every sample in a list of all of them, 0 for the first."""
    rows = _rows(names, ids, path)
    if sorted(rows) != list(range(len(ids))):
        raise ValueError(f"{path} ranks {len(set(rows))} different samples of {len(ids)}: a ranking needs each once")
    values = np.empty(len(ids))
    values[rows] = np.linspace(0, 1, len(ids)) if len(ids) > 1 else 0.5
    return values


def _ranked(table: pd.DataFrame, ids: Sequence[str], path: Path) -> dict[str, np.ndarray]:
    """Rank in [0, 1] by method, 0 for the easiest, from a table with a row for every sample and method."""
    ranks = _numbers(table["easy_rank"], f"column 'easy_rank' of {path}")
    if (table[["method", "sample_id"]] == "").any(axis=None) or ranks.isna().any():
        raise ValueError(f"{path} has gaps in method, sample_id or easy_rank")
    found = {}
    for method, part in table.assign(easy_rank=ranks).groupby("method", sort=False):
        part = part.sort_values("easy_rank", kind="stable")
        if part["easy_rank"].tolist() != list(range(1, len(part) + 1)):
            raise ValueError(f"the easy_rank of method {method!r} in {path} is no ranking from 1 to {len(part)}")
        found[str(method)] = _ranks(part["sample_id"].tolist(), ids, path)
    return found


def _sides(lists: Mapping[str, Any], ids: Sequence[str], path: Any) -> np.ndarray:
    """0 for easy samples, 1 for hard ones, 0.5 for all others."""
    for side, names in lists.items():
        if not isinstance(names, (list, tuple)):
            raise ValueError(f"{path}: {side!r} is a {type(names).__name__}, no list of samples")
    easy, hard = (set(_rows(lists[side], ids, path)) for side in ("easy", "hard"))
    if easy & hard:
        raise ValueError(f"{path} calls sample {ids[min(easy & hard)]!r} both easy and hard")
    values = np.full(len(ids), 0.5)
    values[list(easy)], values[list(hard)] = 0.0, 1.0
    return values


def _load(path: Path) -> Any:
    try:
        if path.suffix.lower() == ".pt":
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                return content.float().numpy() if isinstance(content, torch.Tensor) else content
            except Exception as error:  # a damaged file makes torch's unpickler raise nearly anything
                raise ValueError(f"{type(error).__name__}: {error}") from None
        if path.suffix.lower() == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {str(error)[:200]}") from None
    raise ValueError(f"published scores are read from .pt, .json, .txt and .csv files, not from {path.name!r}")


def _number(value: Any, path: Path) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    try:
        number = float(value) if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) else np.nan
    except (OverflowError, TypeError):  # an integer beyond all floats, a complex number
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(f"{path} has {str(value)[:40]!r} where a finite number belongs")
    return number

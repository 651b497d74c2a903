"""Scores from and for other tools: CSV and JSONL tables, columns of a dataset, published score files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

TABLES = (".csv", ".jsonl")


def write_table(frame: pd.DataFrame, path: Path, suffix: str) -> None:
    """A table as text, numbers exact."""
    if suffix == ".csv":
        frame.to_csv(path, index=False, float_format="%.17g")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")), encoding="utf-8")


def read_table(path: Path) -> pd.DataFrame:
    """What `write_table` wrote, or any table with a column `sample_id` and columns of numbers.

    Raises:
        ValueError: naming the file, or the column that holds no numbers.
    """
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, dtype={"sample_id": str}, float_precision="round_trip")
        else:
            frame = pd.DataFrame(_json_rows(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read difficulty scores from {path}: {str(error)[:300]}") from None
    if "sample_id" not in frame or frame["sample_id"].isna().any():
        raise ValueError(f"{path} has no column sample_id, or one with gaps; it has {list(frame.columns)}")
    for column in frame.columns:
        if column != "sample_id" and not pd.api.types.is_numeric_dtype(frame[column]):
            raise ValueError(f"column {column!r} of {path} holds no numbers")
    return frame.assign(sample_id=frame["sample_id"].astype(str))


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


def read_published(path: Path, ids: Sequence[str], *, higher: str = "harder") -> np.ndarray:
    """Difficulty of `ids` from a score file of another project, `[N]`, higher = harder.

    - `.pt`: a tensor or list with a number per sample, in the order of `ids`, or a dictionary from id, or position, to
      number (loaded without running any code in it);
    - `.txt`: a sample id, or its position, per line, from the easiest to the hardest; the score is the rank in [0, 1];
    - `.json`: a list or dictionary as in `.pt`, or `{"easy": [...], "hard": [...]}`: 0, 1, and 0.5 for all others.

    Args:
        higher: `"harder"` or `"easier"`: what a larger number means there. Not for rankings and lists.

    Raises:
        ValueError: for an unreadable file, or one that does not fit the samples, naming what is missing.
    """
    if higher not in ("harder", "easier"):
        raise ValueError(f"higher must be 'harder' or 'easier', got {higher!r}")
    position = {str(name): row for row, name in enumerate(ids)}

    def row_of(name: Any) -> int:
        """Where an id, or else a position, stands."""
        if str(name) in position:
            return position[str(name)]
        text = str(name).strip()
        if text.isdecimal() and len(text) < 20 and int(text) < len(ids):
            return int(text)
        raise ValueError(f"{path} names {name!r}, which is neither a sample id nor a position below {len(ids)}")

    if path.suffix == ".txt":
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        rows = [row_of(name) for name in names]
        if sorted(rows) != list(range(len(ids))):
            raise ValueError(
                f"{path} ranks {len(set(rows))} different samples of {len(ids)}: a ranking needs each once"
            )
        values = np.empty(len(ids))
        values[rows] = np.linspace(0, 1, len(ids)) if len(ids) > 1 else 0.5
        return values
    found = _load(path)
    if isinstance(found, Mapping) and set(found) == {"easy", "hard"}:
        for side, names in found.items():
            if not isinstance(names, (list, tuple)):
                raise ValueError(f"{path}: {side!r} is a {type(names).__name__}, no list of samples")
        values = np.full(len(ids), 0.5)
        sides = {side: {row_of(name) for name in found[side]} for side in ("easy", "hard")}
        if sides["easy"] & sides["hard"]:
            both = ids[min(sides["easy"] & sides["hard"])]
            raise ValueError(f"{path} calls sample {both!r} both easy and hard")
        values[list(sides["easy"])], values[list(sides["hard"])] = 0.0, 1.0
        return values
    if isinstance(found, Mapping):
        values = np.full(len(ids), np.nan)
        for name, value in found.items():
            values[row_of(name)] = _number(value, path)
        missing = np.flatnonzero(np.isnan(values))
        if missing.size:
            raise ValueError(f"{path} has no score for {missing.size} samples, the first is {ids[missing[0]]!r}")
    else:
        flat = found.reshape(-1) if isinstance(found, np.ndarray) else found
        if not isinstance(flat, (np.ndarray, list, tuple)):
            raise ValueError(f"{path} holds a {type(found).__name__}, no scores")
        values = np.array([_number(value, path) for value in flat])
        if len(values) != len(ids):
            raise ValueError(f"{path} has {len(values)} scores for {len(ids)} samples")
    return values if higher == "harder" else -values


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".pt":
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
                return found.float().numpy() if isinstance(found, torch.Tensor) else found
            except Exception as error:  # a damaged file makes torch's unpickler raise nearly anything
                raise ValueError(f"{type(error).__name__}: {error}") from None
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {str(error)[:200]}") from None
    raise ValueError(f"published scores are read from .pt, .json and .txt files, not from {path.name!r}")


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

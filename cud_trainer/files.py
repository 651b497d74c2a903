"""Writing results: complete or not at all, and never over something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any


def atomic_write(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let `write(temporary path)` make the file, then move it to `path` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as strict JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_new_file(path: str | Path, overwrite: bool) -> None:
    """Raise `ValueError` when `path` exists and may not be replaced."""
    if Path(path).exists() and not overwrite:
        raise ValueError(f"{path} exists; pass overwrite to replace it")


def check_output_dir(
    path: str | Path, *, overwrite: bool = False, resume: bool = False, known: Collection[str] = ()
) -> None:
    """Raise `ValueError` when `path` holds something and neither `overwrite` nor `resume` was asked for.

    Args:
        known: names of entries that do not count.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output directory {path} is a file")
    if not overwrite and not resume and path.is_dir() and any(entry.name not in known for entry in path.iterdir()):
        raise ValueError(f"output directory {path} is not empty; pass --overwrite, resume, or choose another one")

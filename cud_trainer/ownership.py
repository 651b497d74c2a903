"""An output directory has one owner: one command at a time writes there, and an overwritten run leaves nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import LOCK, check_output_dir, holds_something, remove_leftovers

REPORT_FILES = ("results.json", "report.html", "summary.md", "per_sample.parquet", "kept_samples.parquet", "plots")
# A model, its tokenizer and its card, whichever library has saved them.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.*",
    "model*.safetensors*",
    "pytorch_model*",
    "training_args.bin",
    "README.md",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
)


@contextmanager
def owned(folder: str | Path, what: str = "command", *, passing: bool = False) -> Iterator[Path]:
    """While this process alone writes into `folder`; it may take it several times. A folder that was made for it and
    stayed empty goes again.

    Args:
        passing: an empty folder goes at the end whoever made it.

    Raises:
        ValueError: when another process has it, or it cannot be written.
    """
    folder = Path(folder).expanduser()
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / LOCK, timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout:
        raise ValueError(f"another {what} is running in {folder}; wait for it or choose another directory") from None
    except OSError as error:
        raise ValueError(f"cannot write into output directory {folder}: {error.strerror or error}") from None
    try:
        yield folder
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        for one in [folder, *made] if passing else made:
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()


@contextmanager
def output_directory(
    folder: str | Path,
    files: Iterable[str],
    *,
    inputs: Mapping[str, Any],
    overwrite: bool = False,
    resume: bool = False,
    known: Iterable[str] = (),
    what: str = "command",
) -> Iterator[Path]:
    """The output directory of a command, its own while it runs; leftovers of kills are removed at once.

    A command that is refused (`ValueError`, or a package is missing) where nothing was takes away what it made: the
    corrected one starts as if it had never been.

    Args:
        files: patterns of what a command of this kind writes.
        inputs: what the command reads, by option; other values than paths that exist do not count.
        known: names that do not count as something in `folder`.

    Raises:
        ValueError: when it is not empty and may not be, is read by the command, or is another process's.
    """
    folder, files = Path(folder).expanduser(), tuple(files)
    check_no_input(folder, inputs, files if overwrite else ())
    check_output_dir(folder, overwrite=overwrite, resume=resume, known=list(known))  # before anything is made
    with owned(folder, what):
        check_output_dir(folder, overwrite=overwrite, resume=resume, known=list(known))
        remove_leftovers(folder)
        anew = not holds_something(folder)
        try:
            yield folder
        except (ValueError, ImportError):
            if anew:
                clear(folder, files)
            raise


def check_no_input(folder: Path, inputs: Mapping[str, Any], cleared: Iterable[str] = ()) -> None:
    """Raise `ValueError` when `folder` is one that is read, or when what is read there is about to be deleted."""
    doomed = [path.resolve() for path in _matches(folder, cleared)]
    for name, value in inputs.items():
        if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
            continue
        path = Path(value).expanduser()
        if not path.exists():
            continue
        path = path.resolve()
        if path == folder.resolve():
            raise ValueError(f"output directory {folder} is {name}, which is never written to; choose another one")
        if any(path == one or one in path.parents for one in doomed):
            raise ValueError(
                f"{name} {value} lies in {folder}, and overwrite would delete it; choose another directory"
            )


def same_file(first: str | Path, second: str | Path) -> bool:
    """Whether two paths name one file, there or not."""
    return Path(first).expanduser().resolve() == Path(second).expanduser().resolve()


def clear(folder: str | Path, files: Iterable[str]) -> None:
    """Delete what an earlier command has left in `folder`: whatever matches `files`, and nothing else."""
    for path in _matches(Path(folder), files):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def check_output_file(name: str, path: str | Path, inputs: Mapping[str, Any]) -> None:
    """Raise `ValueError` when the file that option `name` is to write is one that is read, or in such a folder."""
    target = Path(path).expanduser().resolve()
    for option, value in inputs.items():
        if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
            continue
        source = Path(value).expanduser()
        if source.exists() and (source.resolve() == target or (target.exists() and source.resolve() in target.parents)):
            raise ValueError(f"{name} {path} would replace what {option} reads; choose another file")
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {name} {path}: {folder} is no folder that can be written to")


def _matches(folder: Path, files: Iterable[str]) -> list[Path]:
    return [path for pattern in files for path in folder.glob(pattern)] if folder.is_dir() else []

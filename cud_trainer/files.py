"""Writing results: complete or not at all, and never over something else. Reading back what was written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

METADATA_KEY = b"cud_trainer"
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
LOCK = ".lock"  # of the process that writes into a folder
# Of files and folders that tell about single samples: for their owner alone.
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


def atomic_write(path: str | Path, write: Callable[[Path], Any], *, private: bool = False) -> Path:
    """Let `write(temporary path)` make the file, then move it to `path` in one step.

    Args:
        private: whether the file tells about single samples: nobody but its owner may read it, at any time.

    Raises:
        DiskFullError: naming `path`; nothing of the file is left then, and what was there before is.
    """
    path = Path(path).expanduser()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with full_disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if private:
                create_private(temporary)
            write(temporary)
            if private:
                temporary.chmod(PRIVATE_FILE)  # `write` may have made another file of that name
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def create_private(path: str | Path) -> Path:
    """An empty file that nobody but its owner may read, whatever the umask; one that is there is emptied."""
    path = Path(path)
    os.close(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, PRIVATE_FILE))
    path.chmod(PRIVATE_FILE)  # of a file that was there
    return path


def private_folder(path: str | Path) -> Path:
    """The folder at `path`, made if it is not there, that nobody but its owner may enter."""
    path = Path(path)
    path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    path.chmod(PRIVATE_FOLDER)
    return path


def write_json(path: str | Path, value: Any, *, private: bool = False) -> Path:
    """Write `value` as strict JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), private=private)


def write_parquet(path: str | Path, table: pa.Table, header: dict[str, Any]) -> Path:
    """Write a table about single samples and its header (JSON values), atomically, with checksums, for its owner."""
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(header).encode()})
    return atomic_write(
        path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True), private=True
    )


def read_parquet(path: str | Path, what: str) -> tuple[pa.Table, dict[str, Any]]:
    """Table and header that `write_parquet` wrote.

    Raises:
        ValueError: naming the file, called `what`, when it is missing, damaged or of another kind.
    """
    try:
        with pq.ParquetFile(Path(path).expanduser(), page_checksum_verification=True) as file:
            table = file.read()
        table.validate(full=True)
        metadata = (table.schema.metadata or {}).get(METADATA_KEY)
        header = None if metadata is None else json.loads(metadata)
    except Exception as error:  # a damaged file makes pyarrow raise nearly anything
        raise ValueError(f"cannot read {what} from {path}: {str(error)[:300]}") from None
    if not isinstance(header, dict):
        raise ValueError(f"cannot read {what} from {path}: it holds no {what.removeprefix('a ')} (no header of ours)")
    return table, header


class DiskFullError(OSError):
    """There was no room for a file."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(errno.ENOSPC, "the disk is full", str(path))

    def __str__(self) -> str:
        return f"the disk is full: cannot write {self.filename}"


@contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """A full disk becomes a `DiskFullError` that names `path`, whatever library found out, and how."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not (disk_full(error) or _torch_failed_to_write(error, Path(path))):
            raise
        raise DiskFullError(path) from error


def disk_full(error: BaseException | None) -> bool:
    """Whether `error` comes from a full disk, or a quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors and tokenizers have errors of their own
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _torch_failed_to_write(error: Exception, path: Path) -> bool:
    """`torch.save` does not say what was wrong; less room than any of its files needs tells."""
    if "inline_container" not in str(error):
        return False
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    return shutil.disk_usage(folder).free < 1 << 16


def holds_something(folder: str | Path, known: Collection[str] = ()) -> bool:
    """Whether there is anything in `folder` but `known` names, a lock, and what a killed process left unfinished."""
    folder = Path(folder).expanduser()
    return folder.is_dir() and any(
        entry.name not in (*known, LOCK) and not TEMPORARY.fullmatch(entry.name) for entry in folder.iterdir()
    )


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that killed processes left in `folder` and below; only where nobody is writing."""
    for path in Path(folder).rglob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def check_new_file(path: str | Path, overwrite: bool) -> None:
    """Raise `ValueError` when `path` exists and may not be replaced, or is a folder."""
    if Path(path).expanduser().is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    if Path(path).expanduser().exists() and not overwrite:
        raise ValueError(f"{path} exists; pass overwrite to replace it")


def check_output_dir(
    path: str | Path, *, overwrite: bool = False, resume: bool = False, known: Collection[str] = ()
) -> None:
    """Raise `ValueError` when `path` holds something and neither `overwrite` nor `resume` was asked for.

    Args:
        known: names of entries that do not count; nor do temporary files that a killed process left.
    """
    path = Path(path).expanduser()
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"output directory {path} is a file, or a link to nothing")
    if not overwrite and not resume and holds_something(path, known):
        raise ValueError(f"output directory {path} is not empty; pass --overwrite, resume, or choose another one")

"""Files as rows: text as it stands there. What looks like a number, a date or nothing stays the text that it is.

Rows are read one after the other and go into a table of Arrow (`tables`): a long file takes what its rows take there.
Only what is one value by itself is read whole: a document, a workbook, a JSON object of columns or of rows.
"""

from __future__ import annotations

import ast
import codecs
import csv
import gzip
import io
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, TextIO

import pandas as pd
from datasets import Dataset

from .columns import TEXTS
from .tables import AlsoText, Number, Row, dataset_of

# Where a value of these columns is no text, it is written as one; ids are no numbers.
AS_TEXT = frozenset({"id", "sample_id", *TEXTS})
# Columns that hold lists, which a table has as text.
LISTS = frozenset({"messages", "conversations"})
# Characters that are read at a time.
PIECE = 2**20
BLANK = re.compile(r"\s*")


def kind_of(path: Path) -> str | None:
    """What a file is, a key of `READERS`; `None` for what cannot be read. Its first bytes go before its name."""
    with path.open("rb") as file:
        start = file.read(512)
    if start[:2] == b"\x1f\x8b":
        inner = Path(path.stem if path.suffix.lower() in (".gz", ".gzip") else path.name).suffix.lower()
        return SUFFIXES.get(inner, "json")
    if start[:4] == b"PAR1":
        return "parquet"
    known = SUFFIXES.get(path.suffix.lower())
    if known is None and start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "json"
    return known


def read_file(path: Path) -> Dataset:
    """The rows of a file, in memory.

    Raises:
        ValueError: for a file that cannot be read, naming it and, where there is one, the line.
    """
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"{path.name} is none of the kinds that can be read: {', '.join(SUFFIXES)}, also as .gz")
    if not path.stat().st_size:
        raise ValueError("it is empty")
    if kind != "workbook" and not _first_character(path):
        raise ValueError(f"{path.name} is empty")
    as_text = AS_TEXT
    while True:
        try:
            return dataset_of(READERS[kind](path), as_text, path.name)
        except AlsoText as found:  # a few columns at most, so that it is read a few times
            as_text = as_text | found.columns
        except UnicodeEncodeError:  # half of a character, written as an escape
            raise ValueError(f"{path.name} holds half a character (a lone surrogate escape)") from None


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, of what is packed in it if it is packed."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if not packed:
        with path.open("rb") as file:
            yield file
        return
    try:
        with gzip.open(path) as unpacked:
            yield unpacked  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} cannot be unpacked: {error}") from None


@contextmanager
def _opened(path: Path, newline: str = "\n") -> Iterator[TextIO]:
    """Text in UTF-8, or in UTF-16 with the mark of it; `ValueError` naming the line that is neither."""
    with _unpacked(path) as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        file.seek(0)
        try:
            yield io.TextIOWrapper(file, encoding=encoding, newline=newline)
        except UnicodeDecodeError:
            raise ValueError(_undecodable(path, encoding)) from None


def _undecodable(path: Path, encoding: str) -> str:
    """What to say of the first byte that is none of the encoding."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with _unpacked(path) as file:
        try:
            for piece in chain(iter(partial(file.read, PIECE), b""), [b""]):
                line += decoder.decode(piece, final=not piece).count("\n")
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            return (
                f"{path.name} is not {encoding.removesuffix('-sig').upper()}: byte 0x{error.object[error.start]:02x} "
                f"in line {line}; save it in UTF-8"
            )
    return f"{path.name} is not {encoding}"  # it changed while it was read


def _first_character(path: Path) -> str:
    """The first that is not blank, if there is one."""
    with _opened(path) as file:
        return next((piece.lstrip()[0] for piece in iter(partial(file.read, PIECE), "") if piece.strip()), "")


def _text(path: Path) -> Iterator[Row]:
    with _opened(path, newline="") as file:
        yield {"text": file.read()}


def _delimited(path: Path) -> Iterator[Row]:
    """CSV, with whichever of comma, semicolon and tab the first line has."""
    csv.field_size_limit(sys.maxsize)
    with _opened(path, newline="") as file:
        head = file.readline()
        delimiter = next((mark for mark in (",", "\t", ";") if mark in head), ",")
        reader = csv.reader(chain([head], file), delimiter=delimiter, strict=True)
        try:
            header = [column.strip() for column in next(reader)]
            if len(set(header)) < len(header):
                raise ValueError(f"{path.name} has a column twice: {header}")
            written = [column for column in header if column in AS_TEXT | LISTS]
            number = 0
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise ValueError(
                        f"line {reader.line_num} of {path.name} has {len(values)} fields, its header has {len(header)}"
                    )
                row = dict(zip(header, values, strict=True))
                _check_no_written_list(row, written, path.name, number)
                number += 1
                yield row
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {path.name}: {error}") from None


def _workbook(path: Path) -> Iterator[Row]:
    """A sheet has a million rows at most."""
    name = path.name
    with _unpacked(path) as file:
        data = file.read()
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ValueError(f"{name} is no workbook of Excel")
    try:
        book = pd.ExcelFile(io.BytesIO(data))
        if len(book.sheet_names) > 1:
            raise ValueError(f"{name} has several sheets ({book.sheet_names}): save the one that is meant as CSV")
        table = book.parse(0, dtype=str, keep_default_na=False)  # type: ignore[call-overload]
    except ImportError:
        raise ValueError(f"reading {name} needs openpyxl (`pip install openpyxl`); or save it as CSV") from None
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} is no workbook of Excel: {error}") from None
    header = [str(column).strip() for column in table.columns]
    written = [column for column in header if column in AS_TEXT | LISTS]
    for number, values in enumerate(table.itertuples(index=False, name=None)):
        row = dict(zip(header, values, strict=True))
        _check_no_written_list(row, written, name, number)
        yield row


def _check_no_written_list(row: Row, columns: Sequence[str], name: str, number: int) -> None:
    """Raise `ValueError` for a list of answers that was written as text: it would be one answer."""
    for column in columns:
        if is_written_list(row[column]):
            raise ValueError(
                f"column {column!r} of {name} holds a list that was written as text (row {number}): "
                "save the data as JSON Lines or parquet"
            )


def is_written_list(value: Any) -> bool:
    """Whether a text is a list of texts or mappings, as a program writes one into a table."""
    if not isinstance(value, str) or not (value.strip().startswith("[") and value.strip().endswith("]")):
        return False
    try:
        found = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return isinstance(found, list) and bool(found) and all(isinstance(one, (str, dict)) for one in found)


def _json(path: Path, *, lines: bool = False) -> Iterator[Row]:
    """An array of objects or of texts, an object of columns or of rows, or an object a line.

    Args:
        lines: whether an object that has a line for itself is a row, whatever is in it.
    """
    array = _first_character(path) == "["
    with _opened(path) as file:
        yield from _array(file, path.name) if array else _objects(file, path.name, lines)


def _array(file: TextIO, name: str) -> Iterator[Row]:
    """The entries of an array: objects, or texts."""
    texts: bool | None = None
    for number, entry in enumerate(_Entries(file, name)):
        if texts is None:
            texts = isinstance(entry, str)
        if not isinstance(entry, str if texts else dict):
            raise ValueError(f"{name} holds neither rows nor columns of a dataset (entry {number} of its array)")
        yield entry if isinstance(entry, dict) else {"text": entry}


class _Entries:
    """The entries of a JSON array: of its text, no more is in memory than the longest takes."""

    def __init__(self, file: TextIO, name: str) -> None:
        self.file, self.name = file, name
        self.text, self.at, self.line = "", 0, 1

    def __iter__(self) -> Iterator[Any]:
        self._character()
        self.at += 1  # the bracket
        if self._character() == "]":
            self.at += 1
        else:
            while True:
                yield self._entry()
                mark = self._character()
                self.at += 1
                if mark == "]":
                    break
                if mark != ",":
                    self._refuse("the array ends in the middle" if not mark else "Expecting ',' delimiter")
        if self._character():
            self._refuse("there is more behind the array")

    def _character(self) -> str:
        """The next one that is not blank; nothing at the end."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def _entry(self) -> Any:
        self._character()
        while True:
            try:
                entry, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self._read():  # then it is not because the rest is missing
                    self._refuse(error.msg, self.text.count("\n", self.at, error.pos))
            except (ValueError, RecursionError) as error:
                self._refuse(str(error))
            else:
                if end < len(self.text) or not self._read():  # at its end, a number may go on
                    self.at = end
                    return entry

    def _read(self) -> bool:
        """Read on, as much again as there is left."""
        piece = self.file.read(max(PIECE, len(self.text) - self.at))
        if piece:
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def _refuse(self, what: str, lines: int = 0) -> None:
        line = self.line + self.text.count("\n", 0, self.at) + lines
        raise ValueError(f"line {line} of {self.name}: {what}") from None


def _objects(file: TextIO, name: str, lines: bool) -> Iterator[Row]:
    """An object a line, or one object over any number of lines."""
    each = ((number, line) for number, line in enumerate(iter(file.readline, ""), 1) if line.strip())
    number, line = next(each)
    try:
        found = _parsed(line)
    except (ValueError, RecursionError) as error:
        yield from _one_value(line + file.read(), name, number, error)
        return
    second = next(each, None)
    if second is None and not lines:
        yield from _rows(found, name)
        return
    yield _an_object(found, name, number)
    for number, line in each if second is None else chain([second], each):
        try:
            found = _parsed(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {name}: {error}") from None
        yield _an_object(found, name, number)


def _an_object(found: Any, name: str, line: int) -> Row:
    if not isinstance(found, dict):
        raise ValueError(f"line {line} of {name} is no JSON object")
    return found


def _one_value(text: str, name: str, line: int, error: Exception) -> Sequence[Row]:
    """The rows of one value over many lines, whatever the file is called.

    Args:
        line: where it begins.
        error: why that line is none by itself.
    """
    try:
        return _rows(_parsed(text), name)
    except json.JSONDecodeError as whole:
        if whole.lineno > 1 and "\n" in text.strip():
            raise ValueError(f"line {line + whole.lineno - 1} of {name}: {whole.msg}") from None
    raise ValueError(f"line {line} of {name}: {error}") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


DECODER = json.JSONDecoder(parse_float=Number, parse_constant=lambda _: None, object_pairs_hook=_unique)
_parsed = DECODER.decode


def _rows(found: Any, name: str) -> Sequence[Row]:
    """Rows in a JSON object; `ValueError` where there are none."""
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{name} holds neither rows nor columns of a dataset")
    values = list(found.values())
    if "messages" in found or "conversations" in found or not any(isinstance(one, (list, dict)) for one in values):
        return [found]
    if all(isinstance(one, dict) for one in values):
        return values
    if all(isinstance(one, list) and len(one) == len(values[0]) for one in values) and not (
        len(values) == 1 and all(isinstance(one, dict) for one in values[0])
    ):
        return [dict(zip(found, row, strict=True)) for row in zip(*values, strict=True)]
    parts = [one for one in values if isinstance(one, list) and one and all(isinstance(row, dict) for row in one)]
    if len(parts) > 1:
        raise ValueError(f"{name} holds neither rows nor columns of a dataset")
    return parts[0] if parts else [found]  # beside what describes them


SUFFIXES = {
    ".json": "json",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".xlsx": "workbook",
}
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "json": _json,
    "json lines": partial(_json, lines=True),
    "csv": _delimited,
    "text": _text,
    "workbook": _workbook,
}

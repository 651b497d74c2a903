"""Files as rows: text as it stands there. What looks like a number, a date or nothing stays the text that it is."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .columns import TEXTS

# Where a value of these columns is no text, it is written as one; ids are no numbers.
AS_TEXT = frozenset({"id", "sample_id", *TEXTS})
Columns = dict[str, list[Any]]


class Number(float):
    """A number of a JSON file, and how it is written there."""

    text: str

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


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


def read_file(path: Path) -> Columns:
    """The columns of a file.

    Raises:
        ValueError: for a file that cannot be read, naming it and, where there is one, the line.
    """
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"{path.name} is none of the kinds that can be read: {', '.join(SUFFIXES)}, also as .gz")
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path.name} cannot be unpacked: {error}") from None
    if not data.strip():
        raise ValueError(f"{path.name} is empty" if data else "it is empty")
    try:
        return READERS[kind](data, path.name)
    except UnicodeEncodeError:  # half of a character, written as an escape
        raise ValueError(f"{path.name} holds half a character (a lone surrogate escape)") from None


def _decoded(data: bytes, name: str) -> str:
    """Text in UTF-8, or in UTF-16 with the mark of it; `ValueError` naming the line that is neither."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{name} is not {encoding.removesuffix('-sig').upper()}: byte 0x{data[error.start]:02x} in line {line}; "
            "save it in UTF-8"
        ) from None


def _text(data: bytes, name: str) -> Columns:
    return {"text": [_decoded(data, name)]}


def _delimited(data: bytes, name: str) -> Columns:
    """CSV, with whichever of comma, semicolon and tab the first line has."""
    text = _decoded(data, name)
    head = text.split("\n", 1)[0]
    delimiter = next((mark for mark in (",", "\t", ";") if mark in head), ",")
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [column.strip() for column in next(reader)]
        if len(set(header)) < len(header):
            raise ValueError(f"{name} has a column twice: {header}")
        columns: Columns = {column: [] for column in header}
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"line {reader.line_num} of {name} has {len(row)} fields, its header has {len(header)}"
                )
            for column, value in zip(header, row, strict=True):
                columns[column].append(value)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {name}: {error}") from None
    return _without_written_lists(columns, name)


def _workbook(data: bytes, name: str) -> Columns:
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
    columns = {str(column).strip(): table[column].tolist() for column in table.columns}
    return _without_written_lists(columns, name)


def _without_written_lists(columns: Columns, name: str) -> Columns:
    """The columns, or `ValueError` for one whose lists of answers were written as text: they would be one answer."""
    for column in AS_TEXT.intersection(columns) | {"messages", "conversations"}.intersection(columns):
        for number, value in enumerate(columns[column]):
            if is_written_list(value):
                raise ValueError(
                    f"column {column!r} of {name} holds a list that was written as text (row {number}): "
                    "save the data as JSON Lines or parquet"
                )
    return columns


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


def _json(data: bytes, name: str) -> Columns:
    """An array of objects or of texts, an object of columns or of rows, or an object a line."""
    text = _decoded(data, name)
    try:
        found = _parsed(text)
    except json.JSONDecodeError:
        return _json_lines(data, name)
    rows = _rows(found)
    if rows is None:
        raise ValueError(f"{name} holds neither rows nor columns of a dataset")
    return _columns(rows, name)


def _json_lines(data: bytes, name: str) -> Columns:
    text = _decoded(data, name)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except (ValueError, RecursionError) as error:
            if not rows:  # one value over many lines, whatever the file is called
                try:
                    return _columns(_rows(_parsed(text)) or [], name)
                except json.JSONDecodeError:
                    pass
            raise ValueError(f"line {number} of {name}: {error}") from None
        if isinstance(row, list) and not rows and len(text.strip().split("\n")) == 1:
            return _columns(_rows(row) or [], name)
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {name} is no JSON object")
        rows.append(row)
    return _columns(rows, name)


def _parsed(text: str) -> Any:
    return json.loads(text, parse_float=Number, parse_constant=lambda _: None, object_pairs_hook=_unique)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _rows(found: Any) -> list[dict[str, Any]] | None:
    """Rows in a JSON value; `None` where there are none."""
    if isinstance(found, list):
        if found and all(isinstance(one, str) for one in found):
            return [{"text": one} for one in found]
        return found if all(isinstance(one, dict) for one in found) else None
    if not isinstance(found, dict) or not found:
        return None
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
    if len(parts) == 1:  # beside what describes them
        return parts[0]
    return None if parts else [found]


def _columns(rows: Sequence[Mapping[str, Any]], name: str) -> Columns:
    """Rows by column, `None` where a row lacks it."""
    if not rows:
        raise ValueError(f"{name} has no rows")
    names = list(dict.fromkeys(column for row in rows for column in row))
    columns = {column: [row.get(column) for row in rows] for column in names}
    for column, values in columns.items():
        kinds = {type(value) for value in values if value is not None}
        if column in AS_TEXT or (len(kinds - {int, Number}) and kinds & {str} and not kinds & {list, dict}):
            columns[column] = [_as_text(value) for value in values]
        for value in columns[column]:
            if isinstance(value, str):
                value.encode()  # what cannot be is half a character
    return columns


def _as_text(value: Any) -> Any:
    """A number or a truth value as it stands in the file; all else as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Number):
        return value.text
    return str(value) if isinstance(value, (int, float)) else value


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
READERS: dict[str, Callable[[bytes, str], Columns]] = {
    "json": _json,
    "json lines": _json_lines,
    "csv": _delimited,
    "text": _text,
    "workbook": _workbook,
}

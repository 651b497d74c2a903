"""Rows of a file as a table of Arrow, some at a time: beside the table, no more than a few thousand are in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset

Row = Mapping[str, Any]
Columns = dict[str, list[Any]]

# Rows that are Python's at a time.
ROWS = 2000


class AlsoText(Exception):
    """Columns that hold text, numbers and truth values: the rows have to be read again with these as text."""

    def __init__(self, columns: Set[str]) -> None:
        super().__init__(columns)
        self.columns = columns


class Number(float):
    """A number of a file, and how it is written there."""

    text: str

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


KINDS = {str: "text", bool: "truth value", int: "number", Number: "number", list: "list", dict: "object"}


def dataset_of(rows: Iterable[Row], as_text: Set[str], name: str) -> Dataset:
    """Rows as a dataset, `None` where a row lacks a column. A column has one type, that of all its rows.

    Args:
        as_text: columns whose numbers and truth values are text, as they are written.
        name: of the file, for errors.

    Raises:
        AlsoText: for further columns that must be.
        ValueError: for no rows, or a column of several types, naming the first row that does not fit.
    """
    tables: list[pa.Table] = []
    kinds: dict[str, set[type]] = defaultdict(set)
    schema = pa.schema([])
    for batch in _batches(iter(rows)):
        names = dict.fromkeys(column for row in batch for column in row)
        columns = {column: [row.get(column) for row in batch] for column in names}
        for column, values in columns.items():
            kinds[column] |= {type(value) for value in values if value is not None}
            if column in as_text:
                columns[column] = [_as_text(value) for value in values]
        mixed = {column for column, found in kinds.items() if column not in as_text and _needs_text(found)}
        if mixed:
            raise AlsoText(mixed)
        table, schema = _fitting(columns, schema, name, sum(map(len, tables)))
        tables.append(table)
    if not tables:
        raise ValueError(f"{name} has no rows")
    return Dataset(pa.concat_tables(tables, promote_options="permissive"))


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, ROWS)):
        yield batch


def _needs_text(kinds: Set[type]) -> bool:
    """Whether a column of such values is one of text, in which some look otherwise: more than numbers, and no lists."""
    return len(kinds) > 1 and bool(kinds & {str, bool}) and not kinds & {list, dict}


def _fitting(columns: Columns, schema: pa.Schema, name: str, before: int) -> tuple[pa.Table, pa.Schema]:
    """Rows as a table, and the schema of it and of what stands before; `ValueError` naming a row that fits in neither.

    Args:
        before: number of rows before.
    """
    try:
        return _joined(columns, schema)
    except (pa.ArrowException, OverflowError):
        pass
    for column, values in columns.items():  # the libraries' own words would spell out the value
        alone = pa.schema([schema.field(column)] if column in schema.names else [])
        if not _fits(column, values, alone):
            low, high = 0, len(values)  # so many rows fit, so many do not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _fits(column, values[:middle], alone) else (low, middle)
            what = KINDS.get(type(values[low]), "value")
            raise ValueError(
                f"the {what} in row {before + low} of column {column!r} of {name} does not fit with what stands before "
                "it: a column has one type"
            )
    raise ValueError(f"rows {before} to {before + len(next(iter(columns.values()))) - 1} of {name} do not fit together")


def _fits(column: str, values: Sequence[Any], schema: pa.Schema) -> bool:
    try:
        _joined({column: list(values)}, schema)
    except (pa.ArrowException, OverflowError):
        return False
    return True


def _joined(columns: Columns, schema: pa.Schema) -> tuple[pa.Table, pa.Schema]:
    table = Dataset.from_dict(columns).with_format("arrow")[:].replace_schema_metadata(None)
    schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
    return table, schema


def _as_text(value: Any) -> Any:
    """A number or a truth value as it stands in the file; all else as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Number):
        return value.text
    return str(value) if isinstance(value, (int, float)) else value

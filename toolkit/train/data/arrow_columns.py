"""Convert the rows of a data file to Arrow columns. If the type of a value differs from the type of
its column, the error says in which row of the file the value is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import datasets
import pyarrow as pa

from toolkit.base.data_files import column_names_fault
from toolkit.base.errors import ConfigError, InputError, first_line
from toolkit.config.data_types import (
    MAX_DEPTH,
    TYPE_MISMATCH_FIX,
    too_deep_message,
    type_mismatch_message,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_TYPE_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)
ARROW_ERRORS = (pa.ArrowException, UnicodeDecodeError, ValueError, KeyError, TypeError, MemoryError)


class Rows(NamedTuple):
    """A table, and the location of each row in its data file. ``location(i)`` returns the location
    of row ``i`` ("train.jsonl:12", "train.json row 7").
    """

    table: pa.Table
    location: Callable[[int], str]


def table_from_rows(
    rows: list[dict[str, Any]],
    location: Callable[[int], str],
    column_names: list[str] | None = None,
) -> Rows:
    """Convert rows to columns. A key that a row does not have gets the value null in this row."""
    keys = dict.fromkeys(column_names or (key for row in rows for key in row))
    if fault := column_names_fault(keys):
        first = next((i for i, row in enumerate(rows) if column_names_fault(row)), 0)
        raise_data_error(location(first), fault)
    columns = {
        name: _build_column(name, [row.get(name) for row in rows], location) for name in keys
    }
    return Rows(pa.table(columns), location)


def validate_rows(rows: Rows, path: Path) -> Rows:
    """Check that a table can be used for training. Return it with each map column converted to
    lists of {key, value}.

    Raises:
        InputError: two columns have the same name, a column name is invalid, or a value cannot be
            read (for example, a text that is not UTF-8).
        ConfigError: a column has a type that the toolkit cannot read.
    """
    table = rows.table
    try:
        names = list(table.column_names)
        table.validate(full=True)
    except ARROW_ERRORS as error:
        raise_data_error(str(path), f"contains a value that cannot be read: {first_line(error)}")
    if fault := column_names_fault(names):
        raise_data_error(str(path), fault)
    for index, field in enumerate(table.schema):
        if pa.types.is_map(field.type):
            column = _maps_to_lists(table.column(index))
            table = table.set_column(index, field.name, column)
    _check_types(table, path)
    return rows._replace(table=table)


def _maps_to_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert the maps of a column to lists of {key, value}, because a Dataset cannot have a map
    column.
    """
    map_type = column.type
    entry_type = pa.struct([("key", map_type.key_type), ("value", map_type.item_type)])
    rows = [
        None if row is None else [{"key": key, "value": value} for key, value in row]
        for row in column.to_pylist()
    ]
    return pa.chunked_array([pa.array(rows, type=pa.list_(entry_type))])


def _field_name_with_nul(arrow_type: pa.DataType) -> str | None:
    """Search the type ``arrow_type`` and its nested types for fields. Return the first field name
    with a NUL character; None if no field name has one.
    """
    for index in range(arrow_type.num_fields):
        field = arrow_type.field(index)
        name = field.name if "\0" in field.name else _field_name_with_nul(field.type)
        if name is not None:
            return name
    return None


def _check_types(table: pa.Table, path: Path) -> None:
    for field in table.schema:
        if _nesting_depth(field.type, MAX_DEPTH) > MAX_DEPTH:
            raise ConfigError(
                too_deep_message(field.name),
                where=str(path),
                fix="remove the column, or store its values as text",
            )
        if (key := _field_name_with_nul(field.type)) is not None:
            raise ConfigError(
                f"column {field.name!r}: the key {key!r} contains a NUL character",
                where=str(path),
                fix="remove the NUL character from the key",
            )
        try:
            datasets.Features.from_arrow_schema(pa.schema([field]))
            table.select([field.name]).slice(0, 1).to_pylist()
        except (*ARROW_ERRORS, NotImplementedError, ImportError, AttributeError) as error:
            raise ConfigError(
                f"column {field.name!r} has the type {str(field.type)[:80]}, which the toolkit "
                f"cannot read: {first_line(error)}",
                where=str(path),
                fix="remove the column, or store its values as text, numbers, lists or objects",
            ) from None


def _nesting_depth(arrow_type: pa.DataType, max_depth: int) -> int:
    """Return how many levels of lists or objects a type has: 0 for a number or a text. The result
    is at most ``max_depth`` + 1, because deeper levels are not counted.
    """
    if max_depth < 0 or not pa.types.is_nested(arrow_type):
        return 0
    inner_depths = (
        _nesting_depth(arrow_type.field(index).type, max_depth - 1)
        for index in range(arrow_type.num_fields)
    )
    return 1 + max(inner_depths, default=0)


def copy_to_memory(table: pa.Table) -> pa.Table:
    """Return a copy of ``table`` in memory. The copy no longer needs the file that ``table`` is
    mapped to.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def without_nulls(value: object) -> Any:
    """Remove the null values that Arrow added to chat messages. If one message of a column has a
    key, Arrow adds this key with the value null to all other messages. Chat templates would treat
    such a null as a value of the user. ``content`` is kept, because it may be null in a message
    with tool calls.
    """
    if isinstance(value, dict):
        return {
            key: without_nulls(item)
            for key, item in value.items()
            if item is not None or (key == "content" and "role" in value)
        }
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def as_dataset(table: pa.Table, chat_column: str | None) -> datasets.Dataset:
    """Return ``table`` as a Dataset for the trainer. ``chat_column`` is the name of the column with
    chats; None if all prompts are texts. Whenever a row is read, ``without_nulls`` removes the
    nulls from the messages in this column.
    """
    dataset = datasets.Dataset(table)
    if chat_column is None or without_nulls(first := table[chat_column].to_pylist()) == first:
        return dataset

    def remove_nulls(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {key: without_nulls(v) if key == chat_column else v for key, v in batch.items()}

    return dataset.with_transform(remove_nulls)


def _build_column(name: str, values: list[Any], location: Callable[[int], str]) -> pa.Array:
    try:
        return pa.array(values)
    except (*_TYPE_ERRORS, UnicodeEncodeError):
        index = _index_of_misfit(values)
    if _has_surrogate(values[index]):
        raise_data_error(
            location(index), f"column {name!r} contains half of a character (a lone surrogate)"
        )
    first = next((value for value in values[:index] if value is not None), None)
    raise ConfigError(
        type_mismatch_message(name, values[index], first),
        where=location(index),
        fix=TYPE_MISMATCH_FIX,
    )


def _index_of_misfit(values: list[Any]) -> int:
    """Return the index of the first value whose type differs from the type of the values before it.
    The index is found by bisection.
    """
    convertible, failing = 0, len(values)  # values[:fits] convert, values[:fails] do not
    while failing - convertible > 1:
        middle = (convertible + failing) // 2
        try:
            pa.array(values[:middle])
            convertible = middle
        except (*_TYPE_ERRORS, UnicodeEncodeError):
            failing = middle
    return failing - 1


def raise_data_error(where: str, problem: str) -> NoReturn:
    """Raise an InputError for a data file with invalid content. ``where`` is the place in the file,
    and ``problem`` is the fault.
    """
    raise InputError(problem, where=where, fix="correct this row or file, or remove it")


def _has_surrogate(value: object) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in _all_characters(value))


def _all_characters(value: object) -> Iterator[str]:
    """Yield the characters of all texts and keys in a nested value."""
    if isinstance(value, str):
        yield from value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from key
            yield from _all_characters(item)
    elif isinstance(value, list):
        for item in value:
            yield from _all_characters(item)

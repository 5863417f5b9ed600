"""Rows of a file as Arrow columns; where one value does not fit its column, that row is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import pyarrow as pa

from toolkit.base.errors import ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TYPE_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)


class Rows(NamedTuple):
    """A table; ``place(i)`` says where row ``i`` stands ("train.jsonl:12", "train.csv row 7")."""

    table: pa.Table
    place: Callable[[int], str]


def from_rows(
    rows: list[dict[str, Any]], place: Callable[[int], str], names: list[str] | None = None
) -> Rows:
    """Rows as columns; a key that a row lacks is null there."""
    keys = dict.fromkeys(names or (key for row in rows for key in row))
    columns = {name: _column(name, [row.get(name) for row in rows], place) for name in keys}
    return Rows(pa.table(columns), place)


def _column(name: str, values: list[Any], place: Callable[[int], str]) -> pa.Array:
    try:
        return pa.array(values)
    except _TYPE_ERRORS:
        index = _first_misfit(values)
        first = next((value for value in values[:index] if value is not None), None)
        raise ConfigError(
            f"column {name!r} holds {kind_of(values[index])} here"
            + (f" and {kind_of(first)} before" if kind_of(first) != kind_of(values[index]) else "")
            + ", which one column cannot hold together",
            where=place(index),
            fix="give every row of the column the same type",
        ) from None
    except UnicodeEncodeError:
        index = next(i for i, value in enumerate(values) if _has_surrogate(value))
        broken(place(index), f"column {name!r} holds half of a character (a lone surrogate)")


def _first_misfit(values: list[Any]) -> int:
    """The index of the first value that does not fit those before it (by bisection)."""
    fits, fails = 0, len(values)  # values[:fits] convert, values[:fails] do not
    while fails - fits > 1:
        middle = (fits + fails) // 2
        try:
            pa.array(values[:middle])
            fits = middle
        except _TYPE_ERRORS:
            fails = middle
    return fails - 1


def broken(where: str, what: str) -> NoReturn:
    raise InputError(what, where=where, fix="mend or remove it")


def kind_of(value: Any) -> str:
    words = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
    }
    return "null" if value is None else words.get(type(value), "a number")


def _has_surrogate(value: Any) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    """Every character of every text in a tree."""
    if isinstance(value, str):
        yield from value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)

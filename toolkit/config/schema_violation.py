"""Find the reason why a value violates a schema, and valid values that the user may have meant."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.config.message_text import describe_schema, show_value, type_name
from toolkit.config.scalars import read_core, read_legacy

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.config.document import Node


def coerce(
    text: str, schema: dict[str, Any], fault: Callable[[Any, dict[str, Any]], object | None]
) -> tuple[Any, ...]:
    """Return the value that ``text`` most likely means, as a tuple of one item. The value is valid
    for ``schema``. Return an empty tuple if there is no such value. ``fault(value, schema)`` is the
    check: it returns None if the value is valid.
    """
    stripped = text.strip()
    candidates = [read_core(stripped), read_legacy(stripped)[1]] if stripped else []
    candidates += [
        int(value) for value in candidates if isinstance(value, float) and _is_integral(value)
    ]
    for value in candidates:
        if (
            value is None
            or isinstance(value, str)
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            continue
        if any(fault(value, branch) is None for branch in schema.get("x-either", [schema])):
            return (value,)
    return ()


def _is_integral(value: float) -> bool:
    return math.isfinite(value) and value.is_integer()


class SchemaViolation(NamedTuple):
    """The reason why a value violates a schema. ``rule`` is the id of the rule that reports the
    violation. ``message`` is the text after the name of the key, and ``notes`` are further lines.
    """

    rule: str
    message: str
    fixes: tuple[Any, ...] = ()  # values to write instead
    notes: tuple[str, ...] = ()


def fits_type(value: object, schema: dict[str, Any]) -> bool:
    """Whether ``schema`` allows the type of ``value``. Bounds and other limits are not checked."""
    kinds = schema.get("type")
    if kinds is None:
        legal_values = [schema["const"]] if "const" in schema else schema.get("enum", [])
        return any(type(legal_value) is type(value) for legal_value in legal_values)
    return any(_is_of_type(value, kind) for kind in ((kinds,) if isinstance(kinds, str) else kinds))


def _is_of_type(value: object, kind: str) -> bool:
    if kind == "integer":
        return type(value) is int
    if kind == "number":
        return type(value) in (int, float)
    return type(value) is _PYTHON_TYPES[kind]


_PYTHON_TYPES: dict[str, type] = {
    "boolean": bool,
    "string": str,
    "array": list,
    "object": dict,
    "null": type(None),
}


def value_fault(value: Any, schema: dict[str, Any]) -> SchemaViolation | None:
    """Return the reason why ``value`` violates ``schema``; None if it does not. The items of a list
    and the values of a mapping are not checked.
    """
    if "x-either" in schema or ("type" in schema and not fits_type(value, schema)):
        return _type_fault(value, schema)
    if "enum" in schema or "const" in schema:
        return _enum_fault(value, schema)
    if type(value) in (int, float):
        return _range_fault(value, schema)
    if isinstance(value, str):
        return _text_fault(value, schema)
    if isinstance(value, list):
        return _list_fault(value, schema)
    return None


def _type_fault(value: object, schema: dict[str, Any]) -> SchemaViolation:
    expected = describe_schema(schema)
    if value is None:
        return SchemaViolation("KEY006", f"null is not allowed here: the value must be {expected}")
    fixes: tuple[Any, ...] = ()
    if isinstance(value, str):
        fixes = coerce(value, schema, value_fault)
    elif (
        isinstance(value, float) and value.is_integer() and value_fault(int(value), schema) is None
    ):
        fixes = (int(value),)
    elif (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value in (0, 1)
        and fits_type(True, schema)
    ):
        fixes = (bool(value),)
    elif not isinstance(value, (dict, list)) and fits_type("", schema):
        fixes = (str(value).lower() if isinstance(value, bool) else str(value),)
    return SchemaViolation(
        "KEY003", f"{show_value(value)} is {type_name(value)}; the value must be {expected}", fixes
    )


def _enum_fault(value: object, schema: dict[str, Any]) -> SchemaViolation | None:
    legal_values = [schema["const"]] if "const" in schema else schema["enum"]
    if any(
        type(legal_value) is type(value) and legal_value == value for legal_value in legal_values
    ):
        return None
    if value is None:
        return SchemaViolation(
            "KEY006",
            f"null is not allowed here: the value must be one of "
            f"{', '.join(map(show_value, legal_values))}",
        )
    from toolkit.base.did_you_mean import nearest  # noqa: PLC0415 - only for a violation

    suggestion = (
        nearest(
            value, [legal_value for legal_value in legal_values if isinstance(legal_value, str)]
        )
        if isinstance(value, str)
        else None
    )
    others = [describe_schema(branch) for branch in schema.get("x-others", ())]
    return SchemaViolation(
        "KEY004",
        f"{show_value(value)} is not one of {', '.join(map(show_value, legal_values))}"
        + "".join(f", and not {other}" for other in others if other != "null"),
        (suggestion,) if suggestion else (),
    )


def _range_fault(value: float, schema: dict[str, Any]) -> SchemaViolation | None:
    for keyword, is_within, words in _LIMITS:
        limit = schema.get(keyword)
        if limit is not None and not is_within(value, limit):
            message = (
                f"{show_value(value)} is out of range: the value must be {words} "
                f"{show_value(limit)}"
            )
            # no fix: the limit would only be a guess at what the user meant
            return SchemaViolation("KEY005", message)
    return None


_LIMITS: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("minimum", lambda value, limit: value >= limit, "at least"),
    ("maximum", lambda value, limit: value <= limit, "at most"),
    ("exclusiveMinimum", lambda value, limit: value > limit, "more than"),
    ("exclusiveMaximum", lambda value, limit: value < limit, "less than"),
)


def _text_fault(value: str, schema: dict[str, Any]) -> SchemaViolation | None:
    if len(value) < schema.get("minLength", 0):
        return SchemaViolation("KEY005", "the string is empty")
    pattern = schema.get("pattern")
    if pattern is not None and not _compiled(pattern).search(value):
        return SchemaViolation(
            "KEY004", f"{show_value(value)} does not match the pattern {pattern}"
        )
    return None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _list_fault(value: list[Node], schema: dict[str, Any]) -> SchemaViolation | None:
    if len(value) < schema.get("minItems", 0):
        return SchemaViolation("KEY005", "the list is empty")
    if schema.get("uniqueItems"):
        seen_items: set[Any] = set()
        for node in value:
            item = repr(node.to_plain())
            if item in seen_items:
                return SchemaViolation(
                    "KEY005", f"{show_value(node.to_plain())} occurs twice in the list"
                )
            seen_items.add(item)
    return None

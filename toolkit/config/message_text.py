"""Convert values and schemas to text for messages."""

from __future__ import annotations

from typing import Any

from toolkit.config.scalars import plain_spelling

_TYPE_NAMES = {
    "integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text",
    "array": "a list", "object": "a mapping", "null": "null",
}  # fmt: skip
_MAX_LENGTH = 60


def show_value(value: object) -> str:
    """Return a value as a short text for messages. Only the first items of a list are shown, and a
    mapping is shown as "a mapping".
    """
    if isinstance(value, dict):
        return "a mapping" if value else "{}"
    if isinstance(value, (list, tuple)):
        items = [show_value(getattr(item, "value", item)) for item in value[:4]]
        return "[" + ", ".join(items) + (", ..." if len(value) > 4 else "") + "]"
    text = plain_spelling(value)
    return text if len(text) <= _MAX_LENGTH else text[: _MAX_LENGTH - 3] + "..."


def type_name(value: object) -> str:
    """Return the name of the type of ``value``, such as ``text``, ``a list`` or ``an integer``."""
    if isinstance(value, bool):
        return "a boolean"
    for kind, name in ((int, "an integer"), (float, "a float"), (str, "text"), (list, "a list")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "a mapping"


def describe_schema(schema: dict[str, Any]) -> str:
    """Return a text that names the types or values that a schema allows, such as ``an integer or
    auto``.
    """
    if "x-either" in schema:
        parts = [describe_schema(branch) for branch in schema["x-either"]]
        return " or ".join(part for part in parts if part != "null") or "null"
    if "const" in schema:
        return show_value(schema["const"])
    if "enum" in schema:
        *others, last = map(show_value, schema["enum"])
        return f"{', '.join(others)} or {last}" if others else last
    kinds = schema.get("type", [])
    names = [
        _TYPE_NAMES[kind]
        for kind in ([kinds] if isinstance(kinds, str) else kinds)
        if kind != "null"
    ]
    return " or ".join(names)


def spell_value(value: object, file_format: str) -> str:
    """Return ``value`` (a scalar) as a file spells it. ``file_format`` is the format of the file:
    "yaml", "json" or "toml".
    """
    text = plain_spelling(value)
    if file_format in ("json", "toml") and isinstance(value, str) and not text.startswith('"'):
        return f'"{text}"'
    return text


def wrap_text(text: str, *, indent: str = "  ") -> list[str]:
    """Return ``text`` as indented lines of at most 96 characters."""
    import textwrap  # noqa: PLC0415 - only to explain

    return textwrap.wrap(
        text, 96, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )

"""Check the rows of a dataset. All values of a column must have one type, and prompts must be
texts or chats.

Validation and training report problems with the messages of this module. Training also uses
pyarrow, but validation does not import it. A test therefore checks that this module accepts the
same types in a column as pyarrow.
"""

from __future__ import annotations

from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
INT64 = range(-(1 << 63), 1 << 63)
EXACT_FLOAT_INTEGERS = range(-(1 << 53), (1 << 53) + 1)
"""The integers that a 64-bit float represents exactly. A column of floats accepts only these
integers.
"""
MAX_DEPTH = 32
"""The maximum number of levels of lists and objects in a column. datasets 5.0 fails at about 40
levels.
"""
_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "a boolean",
    int: "a number",
}


def type_name(value: object) -> str:
    """Return the name of the type of a JSON value, for messages."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), "a number")


def type_mismatch_message(name: str, value: object, first: object) -> str:
    """Return the message for a column with values of different types. ``name`` is the name of the
    column, ``value`` is the wrong value, and ``first`` is an earlier value of the column.
    """
    earlier = (
        f" and {type_name(first)} in earlier rows" if type_name(first) != type_name(value) else ""
    )
    problem = f"column {name!r} has {type_name(value)} in this row{earlier}"
    return f"{problem}, and a column can have only one type"


TYPE_MISMATCH_FIX = "give every row of the column the same type"


class TypeMismatch(Exception):
    """Raised if the type of a value differs from the earlier values of its column."""


class TooDeep(TypeMismatch):
    """Raised if a value is nested in more than ``MAX_DEPTH`` lists and objects."""


def too_deep_message(name: str) -> str:
    """Return the message for a column whose values are nested too deeply."""
    return f"column {name!r} is nested deeper than {MAX_DEPTH} levels"


class ColumnType:
    """The type of a column, as the values that were checked so far show it.

    A column can contain both a boolean and a float. If the float comes first, Arrow and this class
    accept the column. If the boolean comes first, this class refuses the column. Arrow then refuses
    it only if both values are in the same list, or if neither value is nested.
    """

    __slots__ = ("fields", "has_floats", "has_wide_integers", "item", "type")

    def __init__(self) -> None:
        self.type: type | None = None
        self.has_floats = self.has_wide_integers = False
        self.item: ColumnType | None = None
        self.fields: dict[str, ColumnType] = {}

    def add(self, value: Any, depth: int = 0) -> None:
        """Add ``value`` to the values that were checked. Raises TypeMismatch if ``value`` has
        another type than the earlier values, and TooDeep if it is nested too deeply.
        """
        if value is None:
            return
        # integers and floats count as one type
        kind: type = float if type(value) is int else type(value)
        if self.type is not kind:
            if kind is bool and self.has_floats:
                return  # Arrow converts true and false to 1.0 and 0.0
            if depth > MAX_DEPTH:
                raise TooDeep
            if self.type is not None:
                raise TypeMismatch
            self.type = kind
        if kind is float:
            self._add_number(value)
        elif kind is list:
            self.item = self.item or ColumnType()
            for item in value:
                self.item.add(item, depth + 1)
        elif kind is dict:
            for name, item in value.items():
                self.fields.setdefault(name, ColumnType()).add(item, depth + 1)

    def _add_number(self, value: float) -> None:
        if type(value) is float:
            self.has_floats = True
        else:
            if value not in INT64:
                raise TypeMismatch
            self.has_wide_integers = self.has_wide_integers or value not in EXACT_FLOAT_INTEGERS
        if self.has_floats and self.has_wide_integers:
            raise TypeMismatch


def prompt_fault(prompt: Any, *, chats: bool) -> str | None:
    """Return a text that says what is wrong with a prompt; None if it is valid. ``chats`` says
    whether the prompts of the column are chats (lists of messages) or texts.
    """
    if chats:
        return chat_fault(prompt or [])
    if prompt is None or isinstance(prompt, str):
        return None
    return prompt_type_message(type(prompt).__name__)


def prompt_type_message(kind: str) -> str:
    """Return the message for a prompt of the Python type ``kind``, which is neither a text nor a
    list.
    """
    return f"must be a text or a list of messages, not {kind}"


def chat_fault(messages: list[Any]) -> str | None:
    """Return a text that says what is wrong with a chat prompt; None if it is valid."""
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return (
                f"message {number} has no role: each message must be an object "
                "{role: ..., content: ...}"
            )
        if message["role"] not in ROLES:
            return (
                f"message {number} has the role {message['role']!r}, not one of {', '.join(ROLES)}"
            )
        if "content" not in message or not isinstance(message["content"], str | list | None):
            return f"message {number} must have a text as content"
    if messages and messages[-1]["role"] == "assistant":
        return (
            "ends with an assistant message, so the model has nothing to answer: remove that "
            "message (put an expected answer into a separate column)"
        )
    return None

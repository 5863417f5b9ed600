"""Parse JSON (RFC 8259) to nodes with positions. The standard library's json module gives no
positions.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from typing import Any

from toolkit.config.document import Document, Node, StopReading, empty_root
from toolkit.config.finding import Finding, Fix, error_finding
from toolkit.config.scalars import TOO_LARGE_INT, beyond_64_bits, is_long_integer, too_large_message
from toolkit.config.source import MAX_DEPTH, MAX_DIGITS, MAX_NODES, Position, Source

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"')
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "null": None}
_NON_FINITE = re.compile(r"NaN|-?Infinity")


class PositionFinder:
    """Converts offsets in a text to lines and columns."""

    def __init__(self, text: str) -> None:
        self.line_starts = [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", text))]

    def position(self, start: int, end: int) -> Position:
        """Return the position of the characters from ``start`` to ``end``."""
        line = bisect_right(self.line_starts, start)
        return Position(line, start - self.line_starts[line - 1] + 1, start, end)


def parse_json(source: Source) -> Document:
    """Parse a JSON text to a document. The first syntax error becomes a finding, and the rest of
    the text is not read.
    """
    reader = _Reader(source)
    document = Document(source, empty_root(source), reader.findings)
    try:
        document.root = reader.read_document()
    except StopReading as stop:
        document.findings.append(stop.finding)
        document.is_complete = False
    return document


class _Reader:
    def __init__(self, source: Source) -> None:
        self.source, self.text = source, source.text
        self.positions = PositionFinder(source.text)
        self.findings: list[Finding] = []
        self.offset = 0
        self.value_count = 0

    def syntax_error(
        self, message: str, *, rule: str = "DOC001", fix: str | None = None
    ) -> StopReading:
        position = self.positions.position(self.offset, self.offset + 1)
        return StopReading(self.make_finding(rule, position, message, fix))

    def make_finding(self, rule: str, position: Position, message: str, fix: str | None) -> Finding:
        return error_finding(rule, message, self.source, position, *([Fix(fix)] if fix else []))

    def skip_space(self) -> str:
        """Skip white space. Return the character after it, or an empty string at the end of the
        text.
        """
        match = _SPACE.match(self.text, self.offset)
        self.offset = match.end() if match else self.offset
        return self.text[self.offset : self.offset + 1]

    def read_document(self) -> Node:
        self.skip_space()
        node = self.read_value(0)
        if self.skip_space():
            raise self.syntax_error("JSON syntax: unexpected text after the value")
        return node

    def read_value(self, depth: int) -> Node:
        self.value_count += 1
        if self.value_count > MAX_NODES:
            raise self.syntax_error(f"the file has more than {MAX_NODES} values", rule="DOC009")
        if depth > MAX_DEPTH:
            raise self.syntax_error(
                f"values are nested deeper than {MAX_DEPTH} levels", rule="DOC009"
            )
        start, first = self.offset, self.text[self.offset : self.offset + 1]
        value: Any
        if first == "{":
            value = self.read_object(depth)
        elif first == "[":
            value = self.read_array(depth)
        elif first == '"':
            value = self.read_string()
        else:
            value = self.read_constant()
        return Node(value, self.positions.position(start, self.offset), self.source)

    def read_string(self) -> str:
        match = _STRING.match(self.text, self.offset)
        if match is None:
            raise self.syntax_error(
                "JSON syntax: the string that starts here has no end or an invalid escape"
            )
        text = json.loads(match.group())
        assert isinstance(text, str)
        if surrogate := _LONE_SURROGATE.search(text):
            code = f"\\u{ord(surrogate.group()):04x}"
            raise self.syntax_error(
                f"a text contains half of a character (the lone surrogate {code})"
            )
        self.offset = match.end()
        return text

    def read_constant(self) -> Any:
        for word, value in _CONSTANTS.items():
            if self.text.startswith(word, self.offset):
                self.offset += len(word)
                return value
        non_finite = _NON_FINITE.match(self.text, self.offset)
        if non_finite:
            raise self.syntax_error(
                f"{non_finite.group()} is not allowed in a run file: numbers must be finite",
                rule="DOC006",
            )
        match = _NUMBER.match(self.text, self.offset)
        if match is None:
            raise self.syntax_error("JSON syntax: expected a value here")
        text = match.group()
        is_long = is_long_integer(text)
        if len(text) > MAX_DIGITS and not is_long:
            raise self.syntax_error(f"this number has more than {MAX_DIGITS} digits", rule="DOC009")
        position = self.positions.position(self.offset, match.end())
        self.offset = match.end()
        value = TOO_LARGE_INT if is_long else json.loads(text)
        if beyond_64_bits(value):
            fix = "write a smaller number"
            self.findings.append(
                self.make_finding("DOC015", position, too_large_message(text), fix)
            )
        if value in (float("inf"), float("-inf")):
            message = f"{text} is too large for a float, so it would be infinite"
            self.findings.append(self.make_finding("DOC006", position, message, None))
        return value

    def read_array(self, depth: int) -> list[Node]:
        items: list[Node] = []
        self.offset += 1
        if self.skip_space() == "]":
            self.offset += 1
            return items
        while True:
            self.skip_space()
            items.append(self.read_value(depth + 1))
            if not self.has_next_item("]"):
                return items

    def read_object(self, depth: int) -> dict[str, Node]:
        members: dict[str, Node] = {}
        self.offset += 1
        if self.skip_space() == "}":
            self.offset += 1
            return members
        while True:
            self.skip_space()
            start = self.offset
            if self.text[start : start + 1] != '"':
                raise self.syntax_error("JSON syntax: expected a key in double quotes here")
            key = self.read_string()
            key_position = self.positions.position(start, self.offset)
            if self.skip_space() != ":":
                raise self.syntax_error("JSON syntax: expected a colon after the key")
            self.offset += 1
            self.skip_space()
            node = self.read_value(depth + 1)
            self.add_member(members, key, key_position, node)
            if not self.has_next_item("}"):
                return members

    def add_member(
        self, members: dict[str, Node], key: str, key_position: Position, node: Node
    ) -> None:
        if key in members:
            first = members[key].key_position
            lines = (
                f"line {first.line if first else key_position.line} "
                f"or from line {key_position.line}"
            )
            message = f"{key} is written twice in one mapping"
            self.findings.append(
                self.make_finding("DOC002", key_position, message, f"remove the key from {lines}")
            )
            return
        node.key_position = key_position
        members[key] = node

    def has_next_item(self, closing: str) -> bool:
        """Read the character after an item. Return True for a comma, and False for the closing
        bracket.
        """
        following = self.skip_space()
        if following not in (",", closing) or not following:
            raise self.syntax_error(f"JSON syntax: expected a comma or {closing} here")
        self.offset += 1
        if following == "," and self.skip_space() == closing:
            raise self.syntax_error(f"JSON syntax: a comma before {closing} is not allowed")
        return following == ","

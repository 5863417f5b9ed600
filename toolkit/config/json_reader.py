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
_HALF = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}
_FOREIGN = re.compile(r"NaN|-?Infinity")


class Places:
    """Converts offsets in a text to lines and columns."""

    def __init__(self, text: str) -> None:
        self.starts = [0, *(found.end() for found in re.finditer(r"\r\n|\n|\r", text))]

    def mark(self, start: int, end: int) -> Position:
        """Return the position of the characters from ``start`` to ``end``."""
        line = bisect_right(self.starts, start)
        return Position(line, start - self.starts[line - 1] + 1, start, end)


def parse_json(source: Source) -> Document:
    """Parse a JSON text to a document. The first syntax error becomes a finding, and the rest of
    the text is not read.
    """
    reader = _Reader(source)
    document = Document(source, empty_root(source), reader.findings)
    try:
        document.root = reader.whole()
    except StopReading as fault:
        document.findings.append(fault.finding)
        document.is_complete = False
    return document


class _Reader:
    def __init__(self, source: Source) -> None:
        self.source, self.text = source, source.text
        self.places = Places(source.text)
        self.findings: list[Finding] = []
        self.at = 0
        self.count = 0

    def fault(self, message: str, *, rule: str = "DOC001", fix: str | None = None) -> StopReading:
        mark = self.places.mark(self.at, self.at + 1)
        return StopReading(self.finding(rule, mark, message, fix))

    def finding(self, rule: str, mark: Position, message: str, fix: str | None) -> Finding:
        return error_finding(rule, message, self.source, mark, *([Fix(fix)] if fix else []))

    def space(self) -> str:
        """Skip white space. Return the character after it, or an empty string at the end of the
        text.
        """
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return self.text[self.at : self.at + 1]

    def whole(self) -> Node:
        self.space()
        node = self.value(0)
        if self.space():
            raise self.fault("JSON syntax: unexpected text after the value")
        return node

    def value(self, depth: int) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise self.fault(f"the file has more than {MAX_NODES} values", rule="DOC009")
        if depth > MAX_DEPTH:
            raise self.fault(f"values are nested deeper than {MAX_DEPTH} levels", rule="DOC009")
        start, first = self.at, self.text[self.at : self.at + 1]
        value: Any
        if first == "{":
            value = self.mapping(depth)
        elif first == "[":
            value = self.sequence(depth)
        elif first == '"':
            value = self.string()
        else:
            value = self.word()
        return Node(value, self.places.mark(start, self.at), self.source)

    def string(self) -> str:
        found = _STRING.match(self.text, self.at)
        if found is None:
            raise self.fault(
                "JSON syntax: the string that starts here has no end or an invalid escape"
            )
        text = json.loads(found.group())
        assert isinstance(text, str)
        if half := _HALF.search(text):
            code = f"\\u{ord(half.group()):04x}"
            raise self.fault(f"a text contains half of a character (the lone surrogate {code})")
        self.at = found.end()
        return text

    def word(self) -> Any:
        for word, value in _WORDS.items():
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return value
        foreign = _FOREIGN.match(self.text, self.at)
        if foreign:
            raise self.fault(
                f"{foreign.group()} is not allowed in a run file: numbers must be finite",
                rule="DOC006",
            )
        found = _NUMBER.match(self.text, self.at)
        if found is None:
            raise self.fault("JSON syntax: expected a value here")
        text = found.group()
        long = is_long_integer(text)
        if len(text) > MAX_DIGITS and not long:
            raise self.fault(f"this number has more than {MAX_DIGITS} digits", rule="DOC009")
        mark = self.places.mark(self.at, found.end())
        self.at = found.end()
        value = TOO_LARGE_INT if long else json.loads(text)
        if beyond_64_bits(value):
            fix = "write a smaller number"
            self.findings.append(self.finding("DOC015", mark, too_large_message(text), fix))
        if value in (float("inf"), float("-inf")):
            message = f"{text} is too large for a float, so it would be infinite"
            self.findings.append(self.finding("DOC006", mark, message, None))
        return value

    def sequence(self, depth: int) -> list[Node]:
        items: list[Node] = []
        self.at += 1
        if self.space() == "]":
            self.at += 1
            return items
        while True:
            self.space()
            items.append(self.value(depth + 1))
            if not self.more("]"):
                return items

    def mapping(self, depth: int) -> dict[str, Node]:
        members: dict[str, Node] = {}
        self.at += 1
        if self.space() == "}":
            self.at += 1
            return members
        while True:
            self.space()
            start = self.at
            if self.text[start : start + 1] != '"':
                raise self.fault("JSON syntax: expected a key in double quotes here")
            key = self.string()
            mark = self.places.mark(start, self.at)
            if self.space() != ":":
                raise self.fault("JSON syntax: expected a colon after the key")
            self.at += 1
            self.space()
            node = self.value(depth + 1)
            self.keep(members, key, mark, node)
            if not self.more("}"):
                return members

    def keep(self, members: dict[str, Node], key: str, mark: Position, node: Node) -> None:
        if key in members:
            first = members[key].key_position
            lines = f"line {first.line if first else mark.line} or from line {mark.line}"
            message = f"{key} is written twice in one mapping"
            self.findings.append(
                self.finding("DOC002", mark, message, f"remove the key from {lines}")
            )
            return
        node.key_position = mark
        members[key] = node

    def more(self, closing: str) -> bool:
        """Read the character after an item. Return True for a comma, and False for the closing
        bracket.
        """
        following = self.space()
        if following not in (",", closing) or not following:
            raise self.fault(f"JSON syntax: expected a comma or {closing} here")
        self.at += 1
        if following == "," and self.space() == closing:
            raise self.fault(f"JSON syntax: a comma before {closing} is not allowed")
        return following == ","

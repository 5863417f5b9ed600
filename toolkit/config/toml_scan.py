"""Find the positions of keys and values in a TOML text that is known to be valid."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.source import KeyPath

Span = tuple[int, int]
_SPACE_AND_COMMENTS = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_INLINE_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED_TEXT = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'')
_MULTILINE_TEXT = re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'(?:.)*?\'{3,5}', re.DOTALL)
_PLAIN_VALUE = re.compile(r"[^\s,#\]}]+(?: [0-9][^\s,#\]}]*)?")


def scan_positions(text: str) -> Iterator[tuple[KeyPath, Span, Span]]:
    """For each value and each table in a TOML text, yield its path, the span of its key, and the
    span of its value. A span is a pair of offsets (start, end). For a table, both spans are the
    span of its header.
    """
    return _TomlScanner(text).scan_document()


class _TomlScanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.offset = 0
        # the index of the last item of each array of tables so far
        self.last_indices: dict[KeyPath, int] = {}

    def skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.offset)
        self.offset = match.end() if match else self.offset
        return self.text[self.offset : self.offset + 1]

    def scan_document(self) -> Iterator[tuple[KeyPath, Span, Span]]:
        prefix: KeyPath = ()
        while self.skip(_SPACE_AND_COMMENTS):
            if self.text[self.offset] == "[":
                start = self.offset
                prefix = self.read_header()
                span = (start, self.offset)
                for depth in range(1, len(prefix) + 1):
                    yield prefix[:depth], span, span
            else:
                yield from self.read_pair(prefix)

    def read_header(self) -> KeyPath:
        is_array = self.text.startswith("[[", self.offset)
        self.offset += 2 if is_array else 1
        parts, _ = self.read_key()
        path: KeyPath = ()
        for part in parts[:-1]:
            path = self.latest_item((*path, part))
        path = (*path, parts[-1])
        if is_array:
            self.last_indices[path] = self.last_indices.get(path, -1) + 1
        self.skip(_INLINE_SPACE)
        self.offset += 2 if is_array else 1
        return self.latest_item(path)

    def latest_item(self, path: KeyPath) -> KeyPath:
        """Return ``path``, followed by the index of the last item if ``path`` is an array of
        tables. TOML headers refer to the last item of an array.
        """
        return (*path, self.last_indices[path]) if path in self.last_indices else path

    def read_key(self) -> tuple[list[str], Span]:
        """Read a dotted key. Return its parts, and the span of the last part."""
        parts: list[str] = []
        while True:
            self.skip(_INLINE_SPACE)
            start = self.offset
            if self.skip(_BARE_KEY) and self.offset > start:
                parts.append(self.text[start : self.offset])
            else:
                self.skip(_QUOTED_TEXT)
                parts.append(_unquoted(self.text[start : self.offset]))
            span = (start, self.offset)
            if self.skip(_INLINE_SPACE) != ".":
                return parts, span
            self.offset += 1

    def read_pair(self, prefix: KeyPath) -> Iterator[tuple[KeyPath, Span, Span]]:
        parts, key_span = self.read_key()
        self.offset += 1  # skip the equals sign
        self.skip(_INLINE_SPACE)
        path = (*prefix, *parts)
        for depth in range(len(prefix) + 1, len(path)):
            yield path[:depth], key_span, key_span
        yield from self.read_value(path, key_span)

    def read_value(self, path: KeyPath, key_span: Span) -> Iterator[tuple[KeyPath, Span, Span]]:
        start = self.offset
        first_character = self.text[start : start + 1]
        inner_spans: list[tuple[KeyPath, Span, Span]] = []
        if first_character == "[":
            inner_spans = self.read_array(path)
        elif first_character == "{":
            inner_spans = self.read_inline_table(path)
        elif self.text.startswith(('"""', "'''"), start):
            self.skip(_MULTILINE_TEXT)
        elif first_character in "\"'":
            self.skip(_QUOTED_TEXT)
        else:
            self.skip(_PLAIN_VALUE)
        if self.offset == start:
            self.offset = len(self.text)  # always advance, so that the loop ends
        yield path, key_span, (start, self.offset)
        yield from inner_spans

    def read_array(self, path: KeyPath) -> list[tuple[KeyPath, Span, Span]]:
        spans: list[tuple[KeyPath, Span, Span]] = []
        self.offset += 1
        index = 0
        while self.skip(_SPACE_AND_COMMENTS) not in ("]", ""):
            empty_span = (self.offset, self.offset)
            spans += self.read_value((*path, index), empty_span)
            index += 1
            if self.skip(_SPACE_AND_COMMENTS) == ",":
                self.offset += 1
        self.offset += 1
        return spans

    def read_inline_table(self, path: KeyPath) -> list[tuple[KeyPath, Span, Span]]:
        spans: list[tuple[KeyPath, Span, Span]] = []
        self.offset += 1
        while self.skip(_SPACE_AND_COMMENTS) not in ("}", ""):
            spans += self.read_pair(path)
            if self.skip(_SPACE_AND_COMMENTS) == ",":
                self.offset += 1
        self.offset += 1
        return spans


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text.strip("'")
    value = tomllib.loads(f"key = {text}")["key"]
    assert isinstance(value, str)
    return value

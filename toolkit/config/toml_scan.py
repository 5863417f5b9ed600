"""Find the positions of keys and values in a TOML text that is known to be valid."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.source import KeyPath

Span = tuple[int, int]
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_INLINE = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'')
_LONG = re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'(?:.)*?\'{3,5}', re.DOTALL)
_WORD = re.compile(r"[^\s,#\]}]+(?: [0-9][^\s,#\]}]*)?")


def scan_positions(text: str) -> Iterator[tuple[KeyPath, Span, Span]]:
    """For each value and each table in a TOML text, yield its path, the span of its key, and the
    span of its value. A span is a pair of offsets (start, end). For a table, both spans are the
    span of its header.
    """
    return _Scan(text).run()


class _Scan:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        # the index of the last item of each array of tables so far
        self.tables: dict[KeyPath, int] = {}

    def skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return self.text[self.at : self.at + 1]

    def run(self) -> Iterator[tuple[KeyPath, Span, Span]]:
        prefix: KeyPath = ()
        while self.skip(_BLANK):
            if self.text[self.at] == "[":
                start = self.at
                prefix = self.header()
                span = (start, self.at)
                for depth in range(1, len(prefix) + 1):
                    yield prefix[:depth], span, span
            else:
                yield from self.pair(prefix)

    def header(self) -> KeyPath:
        double = self.text.startswith("[[", self.at)
        self.at += 2 if double else 1
        parts, _ = self.key()
        path: KeyPath = ()
        for part in parts[:-1]:
            path = self.latest((*path, part))
        path = (*path, parts[-1])
        if double:
            self.tables[path] = self.tables.get(path, -1) + 1
        self.skip(_INLINE)
        self.at += 2 if double else 1
        return self.latest(path)

    def latest(self, path: KeyPath) -> KeyPath:
        """Return ``path``, followed by the index of the last item if ``path`` is an array of
        tables. TOML headers refer to the last item of an array.
        """
        return (*path, self.tables[path]) if path in self.tables else path

    def key(self) -> tuple[list[str], Span]:
        """Read a dotted key. Return its parts, and the span of the last part."""
        parts: list[str] = []
        while True:
            self.skip(_INLINE)
            start = self.at
            if self.skip(_BARE) and self.at > start:
                parts.append(self.text[start : self.at])
            else:
                self.skip(_QUOTED)
                parts.append(_unquoted(self.text[start : self.at]))
            span = (start, self.at)
            if self.skip(_INLINE) != ".":
                return parts, span
            self.at += 1

    def pair(self, prefix: KeyPath) -> Iterator[tuple[KeyPath, Span, Span]]:
        parts, key = self.key()
        self.at += 1  # skip the equals sign
        self.skip(_INLINE)
        path = (*prefix, *parts)
        for depth in range(len(prefix) + 1, len(path)):
            yield path[:depth], key, key
        yield from self.value(path, key)

    def value(self, path: KeyPath, key: Span) -> Iterator[tuple[KeyPath, Span, Span]]:
        start = self.at
        first = self.text[start : start + 1]
        below: list[tuple[KeyPath, Span, Span]] = []
        if first == "[":
            below = self.array(path)
        elif first == "{":
            below = self.inline_table(path)
        elif self.text.startswith(('"""', "'''"), start):
            self.skip(_LONG)
        elif first in "\"'":
            self.skip(_QUOTED)
        else:
            self.skip(_WORD)
        if self.at == start:
            self.at = len(self.text)  # always advance, so that the loop ends
        yield path, key, (start, self.at)
        yield from below

    def array(self, path: KeyPath) -> list[tuple[KeyPath, Span, Span]]:
        found: list[tuple[KeyPath, Span, Span]] = []
        self.at += 1
        index = 0
        while self.skip(_BLANK) not in ("]", ""):
            place = (self.at, self.at)
            found += self.value((*path, index), place)
            index += 1
            if self.skip(_BLANK) == ",":
                self.at += 1
        self.at += 1
        return found

    def inline_table(self, path: KeyPath) -> list[tuple[KeyPath, Span, Span]]:
        found: list[tuple[KeyPath, Span, Span]] = []
        self.at += 1
        while self.skip(_BLANK) not in ("}", ""):
            found += self.pair(path)
            if self.skip(_BLANK) == ",":
                self.at += 1
        self.at += 1
        return found


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text.strip("'")
    value = tomllib.loads(f"key = {text}")["key"]
    assert isinstance(value, str)
    return value

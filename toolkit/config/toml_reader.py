"""Parse TOML to nodes with positions: the standard library reads the values, and a separate scan
finds their positions.

The scan may assume valid TOML, because tomllib has already read the text. A value that the scan
cannot find (none is known) gets the position of the start of the file. tomlkit does not replace the
scan: 0.15 gives a line and a column for a syntax error, but none for keys and values.
"""

from __future__ import annotations

import datetime
import math
import re
import tomllib
from typing import Any

from toolkit.config.document import Document, Node, StopReading, empty
from toolkit.config.finding import Finding, Fix, error_finding
from toolkit.config.json_reader import Places
from toolkit.config.scalars import beyond_64_bits, too_large
from toolkit.config.source import MAX_DEPTH, MAX_NODES, KeyPath, Position, Source
from toolkit.config.toml_scan import scan

_POSITION = re.compile(r"\(at line (\d+), column (\d+)\)|\(at end of document\)")
MAX_MARKS = 20_000  # limit of values and tables, because tomllib is slow
MAX_PARTS = 2_000  # limit of dots in one key, because tomllib needs quadratic time for them


def parse_toml(source: Source) -> Document:
    """A TOML text as nodes; a syntax error becomes one finding."""
    document = Document(source, empty(source))
    try:
        document.root = _read(source, document)
    except tomllib.TOMLDecodeError as error:
        document.findings.append(_syntax(source, str(error)))
    except RecursionError:
        document.findings.append(error_finding("DOC009", "nested too deep", source))
    except StopReading as fault:
        document.findings.append(fault.finding)
    except _TooMuch as error:
        document.findings.append(error_finding("DOC009", str(error), source))
    else:
        return document
    document.whole = False
    return document


def _read(source: Source, document: Document) -> Node:
    text = source.text.replace("\r\n", "\n")
    if any(line.count(".") > MAX_PARTS for line in text.splitlines()):
        raise _TooMuch("a key has too many parts for a run file")
    if sum(map(text.count, ",=[{")) > MAX_MARKS:
        raise _TooMuch("too many values for a run file")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # int() refuses thousands of digits
        raise _long_integer(source) from None
    places = Places(source.text)
    marks = {
        path: (places.mark(*key), places.mark(*value)) for path, key, value in scan(source.text)
    }
    return _Builder(source, document, marks).node(values, ())


class _TooMuch(Exception):
    """Raised if the text has more values, tables or dots than a run file needs."""


_DIGITS = re.compile(r"(?<![0-9A-Za-z_.+-])[-+]?[0-9][0-9_]{1000,}")


def _long_integer(source: Source) -> StopReading:
    """The finding for an integer of thousands of digits, on which tomllib raises. Its position is
    that of the first such sequence of digits, which may be wrong if a string before it contains
    one.
    """
    found = _DIGITS.search(source.text)
    span = found.span() if found else (0, 0)
    return StopReading(_too_large(source, Places(source.text).mark(*span)))


def _too_large(source: Source, mark: Position) -> Finding:
    text = source.text[mark.start : mark.end]
    return error_finding("DOC015", too_large(text), source, mark, Fix("write a smaller number"))


def _syntax(source: Source, message: str) -> Finding:
    found = _POSITION.search(message)
    text = _POSITION.sub("", message).strip()
    text = text[:1].lower() + text[1:]
    if found is None or found[1] is None:
        last = len(source.lines)
        mark = Position(last, len(source.lines[-1]) + 1, len(source.text), len(source.text))
    else:
        mark = Position(int(found[1]), int(found[2]), 0, 0)
    return error_finding("DOC001", f"TOML syntax: {text}", source, mark)


class _Builder:
    """Combine the values with their positions."""

    def __init__(
        self, source: Source, document: Document, places: dict[KeyPath, tuple[Position, Position]]
    ) -> None:
        self.source, self.document, self.places = source, document, places
        self.count = 0

    def node(self, value: Any, path: KeyPath) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise _TooMuch(f"more than {MAX_NODES} values")
        if len(path) > MAX_DEPTH:
            raise _TooMuch(f"nested deeper than {MAX_DEPTH} levels")
        key, mark = self.places.get(path, (None, Position(1, 1, 0, 0)))
        node = Node(self.below(value, path), mark, self.source)
        node.key = key if path and isinstance(path[-1], str) else None
        if beyond_64_bits(value):
            self.document.findings.append(_too_large(self.source, mark))
        if isinstance(value, float) and not math.isfinite(value):
            message = f"{value} is not allowed in a run file: numbers must be finite"
            self.document.findings.append(error_finding("DOC006", message, self.source, mark))
        return node

    def below(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: self.node(child, (*path, key)) for key, child in value.items()}
        if isinstance(value, list):
            return [self.node(child, (*path, index)) for index, child in enumerate(value)]
        if isinstance(value, (datetime.date, datetime.time)):
            # no key of a run file accepts a date, so it is checked as text
            return value.isoformat()
        return value

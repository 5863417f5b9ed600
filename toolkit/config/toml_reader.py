"""Parse TOML to nodes with positions. The standard library's tomllib reads the values, but it does
not report their positions. A separate scan (``toml_scan``) finds the positions.

The scan may assume valid TOML, because tomllib reads the text first. If the scan did not find a
value, the value would get the position of the start of the file, but no such case is known. The
library tomlkit cannot replace the scan, because version 0.15 reports positions only for syntax
errors.
"""

from __future__ import annotations

import datetime
import math
import re
import tomllib
from typing import Any

from toolkit.config.document import Document, Node, StopReading, empty_root
from toolkit.config.finding import Finding, Fix, error_finding
from toolkit.config.json_reader import PositionFinder
from toolkit.config.scalars import beyond_64_bits, too_large_message
from toolkit.config.source import MAX_DEPTH, MAX_NODES, KeyPath, Position, Source
from toolkit.config.toml_scan import scan_positions

_POSITION = re.compile(r"\(at line (\d+), column (\d+)\)|\(at end of document\)")
MAX_MARKS = 20_000  # the limit on values and tables, because tomllib is slow
# The limit on dots in one line, because tomllib needs quadratic time for the parts of a key.
MAX_PARTS = 2_000


def parse_toml(source: Source) -> Document:
    """Parse a TOML text to a document. A syntax error becomes one finding."""
    document = Document(source, empty_root(source))
    try:
        document.root = _read(source, document)
    except tomllib.TOMLDecodeError as error:
        document.findings.append(_syntax(source, str(error)))
    except RecursionError:
        document.findings.append(error_finding("DOC009", "values are nested too deeply", source))
    except StopReading as fault:
        document.findings.append(fault.finding)
    except _TooMuch as error:
        document.findings.append(error_finding("DOC009", str(error), source))
    else:
        return document
    document.is_complete = False
    return document


def _read(source: Source, document: Document) -> Node:
    text = source.text.replace("\r\n", "\n")
    if any(line.count(".") > MAX_PARTS for line in text.splitlines()):
        raise _TooMuch("a key has too many parts for a run file")
    if sum(map(text.count, ",=[{")) > MAX_MARKS:
        raise _TooMuch("the file has too many values for a run file")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # int() raises ValueError for thousands of digits
        raise _long_integer(source) from None
    places = PositionFinder(source.text)
    marks = {
        path: (places.position(*key), places.position(*value))
        for path, key, value in scan_positions(source.text)
    }
    return _Builder(source, document, marks).node(values, ())


class _TooMuch(Exception):
    """Raised if the text has too many values or tables, is nested too deeply, or has keys with too
    many parts.
    """


_DIGITS = re.compile(r"(?<![0-9A-Za-z_.+-])[-+]?[0-9][0-9_]{1000,}")


def _long_integer(source: Source) -> StopReading:
    """Return the finding for an integer with thousands of digits, for which tomllib raises
    ValueError without a position. The finding gets the position of the first sequence of more than
    1000 digits in the text. This position is wrong if that sequence is part of a string.
    """
    found = _DIGITS.search(source.text)
    span = found.span() if found else (0, 0)
    return StopReading(_too_large(source, PositionFinder(source.text).position(*span)))


def _too_large(source: Source, mark: Position) -> Finding:
    text = source.text[mark.start : mark.end]
    return error_finding(
        "DOC015", too_large_message(text), source, mark, Fix("write a smaller number")
    )


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
    """Makes nodes from the values that tomllib read and the positions that the scan found."""

    def __init__(
        self, source: Source, document: Document, places: dict[KeyPath, tuple[Position, Position]]
    ) -> None:
        self.source, self.document, self.places = source, document, places
        self.count = 0

    def node(self, value: Any, path: KeyPath) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise _TooMuch(f"the file has more than {MAX_NODES} values")
        if len(path) > MAX_DEPTH:
            raise _TooMuch(f"values are nested deeper than {MAX_DEPTH} levels")
        key, mark = self.places.get(path, (None, Position(1, 1, 0, 0)))
        node = Node(self.below(value, path), mark, self.source)
        node.key_position = key if path and isinstance(path[-1], str) else None
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
            # No key of a run file accepts a date. As text, it is reported as a value of the wrong
            # type.
            return value.isoformat()
        return value

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

_ERROR_POSITION = re.compile(r"\(at line (\d+), column (\d+)\)|\(at end of document\)")
MAX_DELIMITERS = 20_000  # the limit on values and tables, because tomllib is slow
# The limit on dots in one line, because tomllib needs quadratic time for the parts of a key.
MAX_DOTS_PER_LINE = 2_000


def parse_toml(source: Source) -> Document:
    """Parse a TOML text to a document. A syntax error becomes one finding."""
    document = Document(source, empty_root(source))
    try:
        document.root = _read_values(source, document)
    except tomllib.TOMLDecodeError as error:
        document.findings.append(_syntax_finding(source, str(error)))
    except RecursionError:
        document.findings.append(error_finding("DOC009", "values are nested too deeply", source))
    except StopReading as stop:
        document.findings.append(stop.finding)
    except _LimitExceeded as error:
        document.findings.append(error_finding("DOC009", str(error), source))
    else:
        return document
    document.is_complete = False
    return document


def _read_values(source: Source, document: Document) -> Node:
    text = source.text.replace("\r\n", "\n")
    if any(line.count(".") > MAX_DOTS_PER_LINE for line in text.splitlines()):
        raise _LimitExceeded("a key has too many parts for a run file")
    if sum(map(text.count, ",=[{")) > MAX_DELIMITERS:
        raise _LimitExceeded("the file has too many values for a run file")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # int() raises ValueError for thousands of digits
        raise _stop_at_long_integer(source) from None
    finder = PositionFinder(source.text)
    positions = {
        path: (finder.position(*key), finder.position(*value))
        for path, key, value in scan_positions(source.text)
    }
    return _NodeBuilder(source, document, positions).build_node(values, ())


class _LimitExceeded(Exception):
    """Raised if the text has too many values or tables, is nested too deeply, or has keys with too
    many parts.
    """


_LONG_NUMBER = re.compile(r"(?<![0-9A-Za-z_.+-])[-+]?[0-9][0-9_]{1000,}")


def _stop_at_long_integer(source: Source) -> StopReading:
    """Return the finding for an integer with thousands of digits, for which tomllib raises
    ValueError without a position. The finding gets the position of the first sequence of more than
    1000 digits in the text. This position is wrong if that sequence is part of a string.
    """
    match = _LONG_NUMBER.search(source.text)
    span = match.span() if match else (0, 0)
    return StopReading(_too_large_finding(source, PositionFinder(source.text).position(*span)))


def _too_large_finding(source: Source, position: Position) -> Finding:
    text = source.text[position.start : position.end]
    return error_finding(
        "DOC015", too_large_message(text), source, position, Fix("write a smaller number")
    )


def _syntax_finding(source: Source, message: str) -> Finding:
    match = _ERROR_POSITION.search(message)
    text = _ERROR_POSITION.sub("", message).strip()
    text = text[:1].lower() + text[1:]
    if match is None or match[1] is None:
        last = len(source.lines)
        position = Position(last, len(source.lines[-1]) + 1, len(source.text), len(source.text))
    else:
        position = Position(int(match[1]), int(match[2]), 0, 0)
    return error_finding("DOC001", f"TOML syntax: {text}", source, position)


class _NodeBuilder:
    """Makes nodes from the values that tomllib read and the positions that the scan found."""

    def __init__(
        self,
        source: Source,
        document: Document,
        positions: dict[KeyPath, tuple[Position, Position]],
    ) -> None:
        self.source, self.document, self.positions = source, document, positions
        self.node_count = 0

    def build_node(self, value: object, path: KeyPath) -> Node:
        self.node_count += 1
        if self.node_count > MAX_NODES:
            raise _LimitExceeded(f"the file has more than {MAX_NODES} values")
        if len(path) > MAX_DEPTH:
            raise _LimitExceeded(f"values are nested deeper than {MAX_DEPTH} levels")
        key_position, position = self.positions.get(path, (None, Position(1, 1, 0, 0)))
        node = Node(self.build_value(value, path), position, self.source)
        node.key_position = key_position if path and isinstance(path[-1], str) else None
        if beyond_64_bits(value):
            self.document.findings.append(_too_large_finding(self.source, position))
        if isinstance(value, float) and not math.isfinite(value):
            message = f"{value} is not allowed in a run file: numbers must be finite"
            self.document.findings.append(error_finding("DOC006", message, self.source, position))
        return node

    def build_value(self, value: object, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: self.build_node(child, (*path, key)) for key, child in value.items()}
        if isinstance(value, list):
            return [self.build_node(child, (*path, index)) for index, child in enumerate(value)]
        if isinstance(value, (datetime.date, datetime.time)):
            # No key of a run file accepts a date. As text, it is reported as a value of the wrong
            # type.
            return value.isoformat()
        return value

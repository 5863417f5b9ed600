"""Parse YAML to nodes with positions. Only this module imports PyYAML.

This module reads libyaml's events and does not call PyYAML's function ``compose``. ``compose``
recurses in C, so a file of 100,000 brackets would end the process with a segmentation fault. The
limits on size and depth are far above what a run file needs. With these limits, reading any input
takes less than one second.

This module parses one text. The module ``layers`` assembles a complete run file from several parsed
texts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import yaml

from toolkit.config.document import Document, Node, StopReading, empty_root
from toolkit.config.finding import Edit, Finding, Fix, Severity, error_finding
from toolkit.config.scalars import (
    TOO_LARGE_INT,
    beyond_64_bits,
    is_long_integer,
    legacy_reading,
    plain_spelling,
    read_core,
    too_large_message,
)
from toolkit.config.source import (
    MAX_ALIASED_NODES,
    MAX_DEPTH,
    MAX_NODES,
    TOO_MANY_ALIASES,
    Position,
    Source,
)

try:
    from yaml.cyaml import CLoader as _Parser
except ImportError:  # without libyaml, PyYAML's own parser makes the same events, but more slowly
    from yaml import Loader as _Parser  # type: ignore[assignment]


def parse_yaml(source: Source) -> Document:
    """Parse the first YAML document of a text. Errors become findings of the returned document."""
    document = Document(source, empty_root(source))
    builder = _Builder(source, document.findings)
    try:
        root = builder.build()
    except StopReading as fault:
        document.findings.append(fault.finding)
        document.is_complete = False
        return document
    document.root = root if root is not None else Node(None, Position(1, 1, 0, 0), source)
    return document


_STARTS = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_ENDS = (yaml.MappingEndEvent, yaml.SequenceEndEvent)
_NODES = (yaml.ScalarEvent, yaml.AliasEvent, *_STARTS)


class _Builder:
    """Builds nodes from YAML events. It uses an explicit stack instead of recursion."""

    def __init__(self, source: Source, findings: list[Finding]) -> None:
        self.source = source
        self.findings = findings
        self.anchors: dict[str, Node] = {}
        self.stack: list[Node] = []  # the collections that were begun and not ended yet
        # for each collection in the stack, the key that has no value yet
        self.keys: list[tuple[str, Position] | None] = []
        self.root: Node | None = None
        self.count = self.aliased = 0

    def finding(self, rule: str, mark: Position, message: str, *fixes: Fix) -> Finding:
        return error_finding(rule, message, self.source, mark, *fixes)

    def tell(self, rule: str, mark: Position, message: str, fix: str) -> None:
        self.findings.append(self.finding(rule, mark, message, Fix(fix)))

    def build(self) -> Node | None:
        try:
            parser = _Parser(self.source.text)
            while (event := parser.get_event()) is not None:
                kind = type(event)
                if kind in _NODES:
                    self.open(event, kind)
                elif kind in _ENDS:
                    self.close(event)
                elif kind is yaml.DocumentStartEvent and self.root is not None:
                    message = "a second YAML document begins here, but a run file has only one"
                    fix = (
                        "remove the second document; to share settings between files, use extends:"
                    )
                    self.tell("DOC005", _mark(event), message, fix)
                    break
        except yaml.MarkedYAMLError as error:
            raise StopReading(self.syntax(error)) from None
        except yaml.reader.ReaderError as error:
            raise StopReading(self.character(error)) from None
        return self.root

    def open(self, event: Any, kind: type) -> None:
        node = self.node(event, kind)
        if self.stack:
            self.place(node, event)
        else:
            self.root = node
        if kind in _STARTS:
            self.stack.append(node)
            self.keys.append(None)
            if len(self.stack) > MAX_DEPTH:
                message = f"values are nested deeper than {MAX_DEPTH} levels"
                raise StopReading(self.finding("DOC009", node.position, message))

    def close(self, event: Any) -> None:
        node = self.stack.pop()
        self.keys.pop()
        start = node.position
        node.position = Position(start.line, start.column, start.start, event.end_mark.index)

    def bounded(self, mark: Position) -> None:
        self.count += 1
        if self.count > MAX_NODES:
            message = f"the file has more than {MAX_NODES} values"
            raise StopReading(self.finding("DOC009", mark, message))

    def node(self, event: Any, kind: type) -> Node:
        mark = _mark(event)
        self.bounded(mark)
        if kind is yaml.AliasEvent:
            return self.alias(str(event.anchor), mark)
        if event.tag not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            message = f"the value has the tag {tag}, but a run file must not use YAML tags"
            self.tell("DOC003", mark, message, "remove the tag")
        if kind is yaml.ScalarEvent:
            node = Node(event.value, mark, self.source, plain=not event.style)
            if node.is_plain:
                self.resolve(node, event.value)
        else:
            empty_value: Any = {} if kind is yaml.MappingStartEvent else []
            node = Node(empty_value, mark, self.source)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def resolve(self, node: Node, text: str) -> None:
        """Set the value of ``node``, which is a plain scalar with the text ``text``. If YAML 1.1
        would read another value, add a warning to the node.
        """
        node.value = value = TOO_LARGE_INT if is_long_integer(text) else read_core(text)
        if beyond_64_bits(value):
            self.tell("DOC015", node.position, too_large_message(text), "write a smaller number")
            return
        if isinstance(value, float) and not math.isfinite(value):
            message = f"{text} is not allowed in a run file: numbers must be finite"
            self.tell("DOC006", node.position, message, "write a finite number")
            return
        other = legacy_reading(text, value)
        if other is not None:
            spelling = plain_spelling(value)
            ours = "text" if isinstance(value, str) else f"the number {value!r}"
            node.yaml11_warning = Finding(
                rule="DOC007",
                severity=Severity.WARNING,
                message=f"{text} is {ours} in YAML 1.2 and {other} in YAML 1.1",
                source=self.source,
                position=node.position,
                fixes=(
                    Fix(
                        spelling,
                        (Edit(self.source, node.position.start, node.position.end, spelling),),
                    ),
                ),
            )

    def alias(self, anchor: str, mark: Position) -> Node:
        target = self.anchors.get(anchor)
        if target is None:
            message = f"YAML syntax: no anchor &{anchor} is defined above"
            raise StopReading(self.finding("DOC001", mark, message))
        if any(target is node for node in self.stack):
            raise StopReading(self.finding("DOC009", mark, f"the alias *{anchor} contains itself"))
        return self.copy(target, mark)

    def copy(self, target: Node, mark: Position) -> Node:
        """Return a copy of ``target`` and all nodes below it, for an alias that refers to
        ``target``. The copied nodes are counted, so that an alias bomb is stopped early.
        """
        self.aliased += 1
        if self.aliased > MAX_ALIASED_NODES:
            raise StopReading(self.finding("DOC009", mark, TOO_MANY_ALIASES))
        copy = Node(target.value, target.position, target.source, plain=target.is_plain)
        copy.key_position = target.key_position
        if isinstance(target.value, dict):
            copy.value = {key: self.copy(child, mark) for key, child in target.value.items()}
        elif isinstance(target.value, list):
            copy.value = [self.copy(child, mark) for child in target.value]
        return copy

    def place(self, node: Node, event: Any) -> None:
        """Add a node to the innermost collection that has not ended, as an item, a key or a value
        of that collection.
        """
        holder = self.stack[-1].value
        if isinstance(holder, list):
            holder.append(node)
            return
        pending = self.keys[-1]
        if pending is None:
            self.keys[-1] = self.key(node, event)
            return
        self.keys[-1] = None
        name, mark = pending
        if name in holder:
            first = holder[name].key_position
            fix = f"remove the key from line {first.line} or from line {mark.line}"
            self.tell("DOC002", mark, f"{name} is written twice in one mapping", fix)
            return
        node.key_position = mark
        holder[name] = node

    def key(self, node: Node, event: Any) -> tuple[str, Position]:
        """Return the name and position of a key. If the key is invalid, add a finding and return a
        unique placeholder as the name.
        """
        nameless = f"\0{node.position.start}"
        if not isinstance(event, yaml.ScalarEvent):
            message = "a key must be a plain name, not a list or a mapping"
            self.tell("DOC010", node.position, message, "write a name before the colon")
            return nameless, node.position
        if node.is_plain and event.value == "<<":
            message = "a merge key (<<) exists only in YAML 1.1, but run files are YAML 1.2"
            fix = "remove the merge key, and share settings with extends: base.yaml"
            self.tell("DOC008", node.position, message, fix)
            return nameless, node.position
        return str(event.value), node.position

    def syntax(self, error: yaml.MarkedYAMLError) -> Finding:
        at = error.problem_mark or error.context_mark
        mark = Position(1, 1, 0, 0)
        if at is not None:
            mark = Position(at.line + 1, at.column + 1, at.index, at.index)
        lines = self.source.lines
        line = lines[mark.line - 1] if mark.line <= len(lines) else ""
        if "\t" in line[: mark.column]:
            message = "this line is indented with a tab, but YAML allows only spaces"
            return self.finding("DOC004", mark, message, Fix("indent with spaces"))
        found = self.finding("DOC001", mark, f"YAML syntax: {error.problem or 'not YAML'}")
        if error.context and error.context_mark:
            context = f"{error.context} that starts on line {error.context_mark.line + 1}"
            return replace(found, notes=(context,))
        return found

    def character(self, error: yaml.reader.ReaderError) -> Finding:
        before = self.source.text[: error.position]
        column = error.position - (before.rfind("\n") + 1) + 1
        mark = Position(before.count("\n") + 1, column, error.position, error.position + 1)
        message = "the file contains a control character, which YAML does not allow"
        return self.finding("DOC013", mark, message, Fix("remove the character"))


def _mark(event: Any) -> Position:
    start, end = event.start_mark, event.end_mark
    return Position(start.line + 1, start.column + 1, start.index, end.index)

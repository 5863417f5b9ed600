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
    builder = _NodeBuilder(source, document.findings)
    try:
        root = builder.build()
    except StopReading as stop:
        document.findings.append(stop.finding)
        document.is_complete = False
        return document
    document.root = root if root is not None else Node(None, Position(1, 1, 0, 0), source)
    return document


_COLLECTION_STARTS = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_COLLECTION_ENDS = (yaml.MappingEndEvent, yaml.SequenceEndEvent)
_NODE_EVENTS = (yaml.ScalarEvent, yaml.AliasEvent, *_COLLECTION_STARTS)


class _NodeBuilder:
    """Builds nodes from YAML events. It uses an explicit stack instead of recursion."""

    def __init__(self, source: Source, findings: list[Finding]) -> None:
        self.source = source
        self.findings = findings
        self.anchors: dict[str, Node] = {}
        self.open_collections: list[Node] = []  # the collections that were begun and not ended yet
        # for each collection in the stack, the key that has no value yet
        self.pending_keys: list[tuple[str, Position] | None] = []
        self.root: Node | None = None
        self.node_count = self.aliased_count = 0

    def make_finding(self, rule: str, position: Position, message: str, *fixes: Fix) -> Finding:
        return error_finding(rule, message, self.source, position, *fixes)

    def report(self, rule: str, position: Position, message: str, fix: str) -> None:
        self.findings.append(self.make_finding(rule, position, message, Fix(fix)))

    def build(self) -> Node | None:
        try:
            parser = _Parser(self.source.text)
            while (event := parser.get_event()) is not None:
                kind = type(event)
                if kind in _NODE_EVENTS:
                    self.start_node(event, kind)
                elif kind in _COLLECTION_ENDS:
                    self.end_collection(event)
                elif kind is yaml.DocumentStartEvent and self.root is not None:
                    message = "a second YAML document begins here, but a run file has only one"
                    fix = (
                        "remove the second document; to share settings between files, use extends:"
                    )
                    self.report("DOC005", _event_position(event), message, fix)
                    break
        except yaml.MarkedYAMLError as error:
            raise StopReading(self.syntax_finding(error)) from None
        except yaml.reader.ReaderError as error:
            raise StopReading(self.character_finding(error)) from None
        return self.root

    def start_node(self, event: Any, kind: type) -> None:
        node = self.make_node(event, kind)
        if self.open_collections:
            self.add_to_collection(node, event)
        else:
            self.root = node
        if kind in _COLLECTION_STARTS:
            self.open_collections.append(node)
            self.pending_keys.append(None)
            if len(self.open_collections) > MAX_DEPTH:
                message = f"values are nested deeper than {MAX_DEPTH} levels"
                raise StopReading(self.make_finding("DOC009", node.position, message))

    def end_collection(self, event: Any) -> None:
        node = self.open_collections.pop()
        self.pending_keys.pop()
        start = node.position
        node.position = Position(start.line, start.column, start.start, event.end_mark.index)

    def count_node(self, position: Position) -> None:
        self.node_count += 1
        if self.node_count > MAX_NODES:
            message = f"the file has more than {MAX_NODES} values"
            raise StopReading(self.make_finding("DOC009", position, message))

    def make_node(self, event: Any, kind: type) -> Node:
        position = _event_position(event)
        self.count_node(position)
        if kind is yaml.AliasEvent:
            return self.resolve_alias(str(event.anchor), position)
        if event.tag not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            message = f"the value has the tag {tag}, but a run file must not use YAML tags"
            self.report("DOC003", position, message, "remove the tag")
        if kind is yaml.ScalarEvent:
            node = Node(event.value, position, self.source, plain=not event.style)
            if node.is_plain:
                self.resolve_scalar(node, event.value)
        else:
            empty_value: Any = {} if kind is yaml.MappingStartEvent else []
            node = Node(empty_value, position, self.source)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def resolve_scalar(self, node: Node, text: str) -> None:
        """Set the value of ``node``, which is a plain scalar with the text ``text``. If YAML 1.1
        would read another value, add a warning to ``node``.
        """
        node.value = value = TOO_LARGE_INT if is_long_integer(text) else read_core(text)
        if beyond_64_bits(value):
            self.report("DOC015", node.position, too_large_message(text), "write a smaller number")
            return
        if isinstance(value, float) and not math.isfinite(value):
            message = f"{text} is not allowed in a run file: numbers must be finite"
            self.report("DOC006", node.position, message, "write a finite number")
            return
        legacy = legacy_reading(text, value)
        if legacy is not None:
            spelling = plain_spelling(value)
            core = "text" if isinstance(value, str) else f"the number {value!r}"
            node.yaml11_warning = Finding(
                rule="DOC007",
                severity=Severity.WARNING,
                message=f"{text} is {core} in YAML 1.2 and {legacy} in YAML 1.1",
                source=self.source,
                position=node.position,
                fixes=(
                    Fix(
                        spelling,
                        (Edit(self.source, node.position.start, node.position.end, spelling),),
                    ),
                ),
            )

    def resolve_alias(self, anchor: str, position: Position) -> Node:
        target = self.anchors.get(anchor)
        if target is None:
            message = f"YAML syntax: no anchor &{anchor} is defined above"
            raise StopReading(self.make_finding("DOC001", position, message))
        if any(target is node for node in self.open_collections):
            raise StopReading(
                self.make_finding("DOC009", position, f"the alias *{anchor} contains itself")
            )
        return self.copy_node(target, position)

    def copy_node(self, target: Node, position: Position) -> Node:
        """Return a copy of ``target`` and all nodes below it, for an alias that refers to
        ``target``. The copied nodes are counted, so that an alias bomb is stopped early.
        """
        self.aliased_count += 1
        if self.aliased_count > MAX_ALIASED_NODES:
            raise StopReading(self.make_finding("DOC009", position, TOO_MANY_ALIASES))
        copy = Node(target.value, target.position, target.source, plain=target.is_plain)
        copy.key_position = target.key_position
        if isinstance(target.value, dict):
            copy.value = {
                key: self.copy_node(child, position) for key, child in target.value.items()
            }
        elif isinstance(target.value, list):
            copy.value = [self.copy_node(child, position) for child in target.value]
        return copy

    def add_to_collection(self, node: Node, event: Any) -> None:
        """Add a node to the innermost collection that has not ended, as an item, a key or a value
        of that collection.
        """
        collection = self.open_collections[-1].value
        if isinstance(collection, list):
            collection.append(node)
            return
        pending = self.pending_keys[-1]
        if pending is None:
            self.pending_keys[-1] = self.read_key(node, event)
            return
        self.pending_keys[-1] = None
        name, key_position = pending
        if name in collection:
            first = collection[name].key_position
            fix = f"remove the key from line {first.line} or from line {key_position.line}"
            self.report("DOC002", key_position, f"{name} is written twice in one mapping", fix)
            return
        node.key_position = key_position
        collection[name] = node

    def read_key(self, node: Node, event: Any) -> tuple[str, Position]:
        """Return the name and position of a key. If the key is invalid, add a finding and return a
        unique placeholder as the name.
        """
        placeholder = f"\0{node.position.start}"
        if not isinstance(event, yaml.ScalarEvent):
            message = "a key must be a plain name, not a list or a mapping"
            self.report("DOC010", node.position, message, "write a name before the colon")
            return placeholder, node.position
        if node.is_plain and event.value == "<<":
            message = "a merge key (<<) exists only in YAML 1.1, but run files are YAML 1.2"
            fix = "remove the merge key, and share settings with extends: base.yaml"
            self.report("DOC008", node.position, message, fix)
            return placeholder, node.position
        return str(event.value), node.position

    def syntax_finding(self, error: yaml.MarkedYAMLError) -> Finding:
        yaml_mark = error.problem_mark or error.context_mark
        position = Position(1, 1, 0, 0)
        if yaml_mark is not None:
            position = Position(
                yaml_mark.line + 1, yaml_mark.column + 1, yaml_mark.index, yaml_mark.index
            )
        lines = self.source.lines
        line = lines[position.line - 1] if position.line <= len(lines) else ""
        if "\t" in line[: position.column]:
            message = "this line is indented with a tab, but YAML allows only spaces"
            return self.make_finding("DOC004", position, message, Fix("indent with spaces"))
        finding = self.make_finding(
            "DOC001", position, f"YAML syntax: {error.problem or 'not YAML'}"
        )
        if error.context and error.context_mark:
            context = f"{error.context} that starts on line {error.context_mark.line + 1}"
            return replace(finding, notes=(context,))
        return finding

    def character_finding(self, error: yaml.reader.ReaderError) -> Finding:
        before = self.source.text[: error.position]
        column = error.position - (before.rfind("\n") + 1) + 1
        position = Position(before.count("\n") + 1, column, error.position, error.position + 1)
        message = "the file contains a control character, which YAML does not allow"
        return self.make_finding("DOC013", position, message, Fix("remove the character"))


def _event_position(event: Any) -> Position:
    start, end = event.start_mark, event.end_mark
    return Position(start.line + 1, start.column + 1, start.index, end.index)

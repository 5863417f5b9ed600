"""A run file as nodes with positions. The readers create the nodes and validation reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolkit.config.source import Position

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.finding import Finding
    from toolkit.config.source import KeyPath, Source


class StopReading(Exception):
    """Raised if the rest of a text cannot be read; carries the finding that says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


class Node:
    """A value with its position. ``value`` is a scalar, a list of nodes, or a dict of nodes."""

    __slots__ = ("key", "mark", "note", "plain", "source", "value")

    def __init__(self, value: Any, mark: Position, source: Source, *, plain: bool = False) -> None:
        self.value = value
        self.mark = mark
        self.source = source
        self.plain = plain  # a plain YAML scalar, whose type comes from its spelling
        self.key: Position | None = None  # the key's position, if this is a value in a mapping
        self.note: Finding | None = (
            None  # the value that YAML 1.1 would read; reported unless the node has a worse finding
        )

    def to_plain(self) -> Any:
        """The value of this node as dict, list and scalars, without positions."""
        value = self.value
        if isinstance(value, dict):
            return {key: child.to_plain() for key, child in value.items()}
        if isinstance(value, list):
            return [child.to_plain() for child in value]
        return value

    def walk(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
        """This node and every node below it, with its path, in source order."""
        yield path, self
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.walk((*path, key))
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.walk((*path, index))


def empty(source: Source) -> Node:
    """An empty root node."""
    return Node({}, Position(1, 1, 0, 0), source)


@dataclass(slots=True)
class Document:
    """A loaded run file: its merged layers, and the findings of loading."""

    source: Source
    root: Node
    findings: list[Finding] = field(default_factory=list)
    readable: bool = True  # False: the file could not be read at all (exit code 2)
    whole: bool = True  # False: reading stopped early, so missing keys mean nothing

    def node(self, path: KeyPath) -> Node | None:
        """The node at ``path``, or None if the run file does not set it."""
        node: Node | None = self.root
        for part in path:
            value = node.value if node is not None else None
            if isinstance(value, dict) and isinstance(part, str):
                node = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                node = value[part]
            else:
                return None
        return node

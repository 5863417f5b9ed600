"""The parsed form of a run file: a tree of nodes, each with its position in the text. The readers
for YAML, JSON and TOML create the nodes, and validation reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolkit.config.source import Position

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.finding import Finding
    from toolkit.config.source import KeyPath, Source


class StopReading(Exception):
    """Raised if the rest of a text cannot be read. ``finding`` says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


class Node:
    """A value with its position. ``value`` is a scalar, a list of nodes, or a dict of nodes."""

    __slots__ = ("is_plain", "key_position", "position", "source", "value", "yaml11_warning")

    def __init__(self, value: Any, mark: Position, source: Source, *, plain: bool = False) -> None:
        self.value = value
        self.position = mark
        self.source = source
        # True for an unquoted YAML scalar. Its type is determined by its spelling.
        self.is_plain = plain
        self.key_position: Position | None = (
            None  # the key's position, if this is a value in a mapping
        )
        # A warning that YAML 1.1 would read another value. It is reported unless the node has an
        # error.
        self.yaml11_warning: Finding | None = None

    def to_plain(self) -> Any:
        """Return the value of this node as dict, list and scalars, without positions."""
        value = self.value
        if isinstance(value, dict):
            return {key: child.to_plain() for key, child in value.items()}
        if isinstance(value, list):
            return [child.to_plain() for child in value]
        return value

    def walk(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
        """Yield ``(path, node)`` for this node and every node below it, in source order."""
        yield path, self
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.walk((*path, key))
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.walk((*path, index))


def empty_root(source: Source) -> Node:
    """Return the root node of an empty document."""
    return Node({}, Position(1, 1, 0, 0), source)


@dataclass(slots=True)
class Document:
    """A loaded run file: its tree of nodes, and the findings of the loading. The tree already
    contains the values of the base files (key ``extends``) and of the ``--set`` overrides.
    """

    source: Source
    root: Node
    findings: list[Finding] = field(default_factory=list)
    is_readable: bool = True  # False: the file could not be read at all (exit code 2)
    # False: reading stopped early, so that a missing key may be in the unread part.
    is_complete: bool = True

    def find_node(self, path: KeyPath) -> Node | None:
        """Return the node at ``path``; None if the run file does not set that key."""
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

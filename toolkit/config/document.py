"""A run file as nodes with positions: loading creates them and validation reads them.

Positions are 1-based lines and columns in characters, as editors count them; offsets are 0-based
into ``Source.text``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from toolkit.config.finding import Finding

KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """A source text: a file, standard input, or one ``--set`` override."""

    name: str  # as findings show it
    text: str
    folder: Path  # the folder that relative paths in this text are relative to
    path: Path | None = None  # the file itself; None for standard input and overrides
    format: str = "yaml"
    bom: str = ""  # kept for --fix
    hidden: list[Mark] = field(default_factory=list)  # secrets, which are never shown

    @property
    def is_override(self) -> bool:
        """Whether this text is one ``--set`` argument."""
        return self.format == "set"

    def hide(self, mark: Mark) -> None:
        """Never show these characters."""
        self.hidden.append(mark)

    @cached_property
    def lines(self) -> list[str]:
        """The lines without line ends, split where YAML, JSON and TOML count lines."""
        return self.text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


@dataclass(frozen=True, slots=True)
class Mark:
    """The position of a scalar, key or collection in its source."""

    line: int
    column: int
    start: int
    end: int


class StopReading(Exception):
    """Raised when reading a text cannot continue; carries the finding that says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


class Node:
    """A value with its position. ``value`` is a scalar, a list of nodes, or a dict of nodes."""

    __slots__ = ("key", "mark", "note", "plain", "source", "value")

    def __init__(self, value: Any, mark: Mark, source: Source, *, plain: bool = False) -> None:
        self.value = value
        self.mark = mark
        self.source = source
        self.plain = plain  # a plain YAML scalar, whose type comes from its spelling
        self.key: Mark | None = None  # the key's position, if this is a value in a mapping
        self.note: Finding | None = (
            None  # what YAML 1.1 would read here; reported unless a worse finding is
        )

    def to_plain(self) -> Any:
        """The value without positions: dict, list and scalars."""
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
    return Node({}, Mark(1, 1, 0, 0), source)


@dataclass(slots=True)
class Document:
    """A loaded run file: its layers merged, and what loading found wrong."""

    source: Source
    root: Node
    findings: list[Finding] = field(default_factory=list)
    readable: bool = True  # False: the file could not be read at all (exit code 2)
    whole: bool = True  # False: reading stopped early, so missing keys mean nothing

    def node(self, path: KeyPath) -> Node | None:
        """The node at ``path``, or None if it is not written."""
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


def dotted(path: KeyPath) -> str:
    """``("reward", "functions", 0, "name")`` as ``reward.functions[0].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the run file"

"""The result of validation: a finding with its position, the arithmetic and the fix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from toolkit.config.source import KeyPath, Position, Source


class Severity(StrEnum):
    """The severity of a finding. An error refuses the run; a warning refuses it only with
    --strict.
    """

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Edit:
    """Characters ``start`` to ``end`` of ``source.text`` become ``text``."""

    source: Source
    start: int
    end: int
    text: str


def rename(source: Source, key: Position, name: str) -> Edit:
    """The edit that renames a key."""
    return Edit(source, key.start, key.end, f'"{name}"' if source.format == "json" else name)


@dataclass(frozen=True, slots=True)
class Fix:
    """One possible fix as text, with ``edits`` if changing scalars and keys is enough. If the edits
    do not show what was moved, --fix prints ``moved`` as old and new.
    """

    text: str
    edits: tuple[Edit, ...] = ()
    moved: tuple[str, str] | None = None


class Located(Protocol):
    """Anything with a position in a source, such as a node of the document."""

    mark: Position
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault, with everything that a person or a program needs to fix it."""

    rule: str
    severity: Severity
    message: str
    path: KeyPath = ()
    source: Source | None = None
    mark: Position | None = None  # None: the whole file
    notes: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()
    related: tuple[Located, ...] = ()  # the other keys whose values cause the fault
    # True: not a fault but something that could not be checked on this machine
    unknown: bool = False

    @property
    def place(self) -> str:
        """The position as text: ``run.yaml:12:20``, ``run.yaml`` for the whole file, or the
        ``--set`` argument itself.
        """
        name = self.source.name if self.source else "run file"
        if self.mark is None or (self.source is not None and self.source.is_override):
            return name
        return f"{name}:{self.mark.line}:{self.mark.column}"

    def as_error(self) -> Finding:
        """The same finding as an error (--strict)."""
        return replace(self, severity=Severity.ERROR)


def error_finding(
    rule: str, message: str, source: Source, mark: Position | None = None, *fixes: Fix
) -> Finding:
    """A finding for a fault that was found while reading a text, at one position or in the whole
    text.
    """
    return Finding(
        rule=rule,
        severity=Severity.ERROR,
        message=message,
        source=source,
        mark=mark,
        fixes=fixes,
    )

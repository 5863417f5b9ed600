"""The result of validation: a finding with its place, the arithmetic and the fix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from toolkit.config.source import KeyPath, Mark, Source


class Severity(StrEnum):
    """An error refuses the run. A warning refuses it only with --strict."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Edit:
    """Characters ``start`` to ``end`` of ``source.text`` become ``text``."""

    source: Source
    start: int
    end: int
    text: str


def rename(source: Source, key: Mark, name: str) -> Edit:
    """The edit that renames a key."""
    return Edit(source, key.start, key.end, f'"{name}"' if source.format == "json" else name)


@dataclass(frozen=True, slots=True)
class Fix:
    """One possible fix as text, with ``edits`` if rewriting scalars and keys is enough. ``moved``
    is what --fix prints as old and new if the edits do not show it.
    """

    text: str
    edits: tuple[Edit, ...] = ()
    moved: tuple[str, str] | None = None


class Located(Protocol):
    """Anything with a place in a source, such as a node of the document."""

    mark: Mark
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault, with everything that a person or a program needs to fix it."""

    rule: str
    severity: Severity
    message: str
    path: KeyPath = ()
    source: Source | None = None
    mark: Mark | None = None  # None: the whole file
    notes: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()
    related: tuple[Located, ...] = ()  # the other operands
    unknown: bool = False  # not a fault but something that could not be checked on this machine

    @property
    def place(self) -> str:
        """``run.yaml:12:20``, the whole ``run.yaml``, or the ``--set`` argument itself."""
        name = self.source.name if self.source else "run file"
        if self.mark is None or (self.source is not None and self.source.is_override):
            return name
        return f"{name}:{self.mark.line}:{self.mark.column}"

    def as_error(self) -> Finding:
        """The same finding as an error (--strict)."""
        return replace(self, severity=Severity.ERROR)


def error_finding(
    rule: str, message: str, source: Source, mark: Mark | None = None, *fixes: Fix
) -> Finding:
    """A fault found while reading a text, at one position or in the whole text."""
    return Finding(
        rule=rule,
        severity=Severity.ERROR,
        message=message,
        source=source,
        mark=mark,
        fixes=fixes,
    )

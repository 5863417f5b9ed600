"""Define the results of validation. A finding has a message, a position, notes and fixes. The notes
show the computation that led to the finding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from toolkit.config.source import KeyPath, Position, Source


class Severity(StrEnum):
    """The severity of a finding. An error prevents the run. A warning prevents the run only if
    ``--strict`` is given.
    """

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of a source text. The characters from ``start`` to ``end`` are replaced by
    ``text``.
    """

    source: Source
    start: int
    end: int
    text: str


def rename_key(source: Source, key: Position, name: str) -> Edit:
    """Return the edit that renames a key to ``name``. ``key`` is the position of the key."""
    return Edit(source, key.start, key.end, f'"{name}"' if source.format == "json" else name)


@dataclass(frozen=True, slots=True)
class Fix:
    """One possible fix of a finding. ``text`` describes the fix. ``edits`` are the changes of the
    source text that apply the fix. ``edits`` is empty if the fix needs more than changes of scalars
    and keys. ``printed_change`` is a pair (old text, new text) that ``--fix`` prints, or None if
    ``--fix`` prints the texts of the edits.
    """

    text: str
    edits: tuple[Edit, ...] = ()
    printed_change: tuple[str, str] | None = None


class Located(Protocol):
    """Anything with a position in a source, such as a node of the document."""

    position: Position
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem in a run file, with everything that a person or a program needs to fix the
    problem.
    """

    rule: str
    severity: Severity
    message: str
    path: KeyPath = ()
    source: Source | None = None
    position: Position | None = None  # None: the whole file
    notes: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()
    related: tuple[Located, ...] = ()  # the other keys whose values cause the problem
    # True: not a problem, but something that could not be checked on this machine
    unknown: bool = False

    @property
    def location(self) -> str:
        """The position as text. This is ``run.yaml:12:20`` for a line and column, ``run.yaml`` for
        the whole file, and the argument itself for a ``--set`` argument.
        """
        name = self.source.name if self.source else "run file"
        if self.position is None or (self.source is not None and self.source.is_override):
            return name
        return f"{name}:{self.position.line}:{self.position.column}"

    def as_error(self) -> Finding:
        """Return the same finding with the severity error (used by --strict)."""
        return replace(self, severity=Severity.ERROR)


def error_finding(
    rule: str, message: str, source: Source, position: Position | None = None, *fixes: Fix
) -> Finding:
    """Return a finding with the severity error, for a problem found while reading a text. If
    ``position`` is None, the problem concerns the whole text.
    """
    return Finding(
        rule=rule,
        severity=Severity.ERROR,
        message=message,
        source=source,
        position=position,
        fixes=fixes,
    )

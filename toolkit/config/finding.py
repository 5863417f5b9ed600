"""What validation tells: a finding with its place, the arithmetic and the fix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.config.document import KeyPath, Mark, Node, Source


class Severity(StrEnum):
    """An error refuses the run; a warning does not, unless under --strict."""

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
    """The edit that gives a key another name."""
    return Edit(source, key.start, key.end, f'"{name}"' if source.format == "json" else name)


@dataclass(frozen=True, slots=True)
class Fix:
    """One way out, as text; ``edits`` are there when rewriting scalars and keys does it.
    ``moved`` is what --fix prints as old and new where the edits do not say it themselves.
    """

    text: str
    edits: tuple[Edit, ...] = ()
    moved: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault, with everything that a person or a program needs to act on it."""

    rule: str
    severity: Severity
    message: str
    path: KeyPath = ()
    source: Source | None = None
    mark: Mark | None = None  # None: the whole file
    notes: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()
    related: tuple[Node, ...] = ()  # the other operands
    unknown: bool = False  # not a fault but something that could not be looked into here

    @property
    def place(self) -> str:
        """``run.yaml:12:20``, the whole ``run.yaml``, or the ``--set`` argument itself."""
        name = self.source.name if self.source else "run file"
        if self.mark is None or (self.source is not None and self.source.is_override):
            return name
        return f"{name}:{self.mark.line}:{self.mark.column}"

    def as_error(self) -> Finding:
        """The same finding, refusing the run (--strict)."""
        return replace(self, severity=Severity.ERROR)


def error_finding(
    rule: str, message: str, source: Source, mark: Mark | None = None, *fixes: Fix
) -> Finding:
    """What reading a text finds wrong, at a place of it, or with all of it."""
    return Finding(
        rule=rule,
        severity=Severity.ERROR,
        message=message,
        source=source,
        mark=mark,
        fixes=fixes,
    )

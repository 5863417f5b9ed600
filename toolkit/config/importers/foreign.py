"""Define the settings that are read from a file of another tool. A setting has a key of that tool,
a value and a position in the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Computed:
    """A value that is known only when the file runs. ``text`` is the expression in the file."""

    text: str
    why: str = "the value is computed when the file runs"


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting in a file of another tool. ``value`` is a scalar, a list, a dict, or a
    ``Computed``.
    """

    key: str
    value: Any
    location: str  # "line 12", or "cell 3, line 4"


@dataclass(frozen=True, slots=True)
class UnreadPart:
    """A part of the file that could not be read, and the reason."""

    location: str
    text: str
    why: str


@dataclass(slots=True)
class ForeignConfig:
    """The settings of a file of another tool. ``format_name`` is the name of the file's format, a
    key of ``formats.TABLE_MODULES``.
    """

    format_name: str
    entries: list[Entry] = field(default_factory=list)
    unread: list[UnreadPart] = field(default_factory=list)

    def add(self, key: str, value: object, location: str) -> None:
        """Add one setting that was read."""
        self.entries.append(Entry(key, value, location))

    def record_unread(self, location: str, text: str, why: str) -> None:
        """Add one part of the file that could not be read, and the reason."""
        self.unread.append(UnreadPart(location, text, why))

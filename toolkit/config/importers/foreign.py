"""Define what is read from a file of another tool: entries with the tool's key, a value and a
position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Computed:
    """A value that is known only when the file is executed. ``text`` is the expression in the
    file.
    """

    text: str
    why: str = "its value is computed when the file runs"


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting in the file. ``value`` is a scalar, a list, a dict, or ``Computed``."""

    key: str
    value: Any
    place: str  # "line 12", or "cell 3, line 4"


@dataclass(frozen=True, slots=True)
class Unread:
    """A part of the file that could not be read, and the reason."""

    place: str
    text: str
    why: str


@dataclass(slots=True)
class Foreign:
    """The settings that a reader found in a file. ``form`` is the format's name in
    ``formats.TABLES``.
    """

    form: str
    entries: list[Entry] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)

    def add(self, key: str, value: Any, place: str) -> None:
        """Add one entry."""
        self.entries.append(Entry(key, value, place))

    def miss(self, place: str, text: str, why: str) -> None:
        """Add one part of the file that could not be read."""
        self.unread.append(Unread(place, text, why))

"""A foreign file as entries: a key in its tool's words, a value, and its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Computed:
    """A value that only running the file would give; ``text`` is how it is written."""

    text: str
    why: str = "it is computed when the file runs"


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting. ``value`` is a scalar, a list, a dict, or ``Computed``."""

    key: str
    value: Any
    place: str  # "line 12", or "cell 3, line 4"


@dataclass(frozen=True, slots=True)
class Unread:
    """What could not be read, and why."""

    place: str
    text: str
    why: str


@dataclass(slots=True)
class Foreign:
    """What a reader made of a file. ``form`` is the format's name in ``formats.TABLES``."""

    form: str
    entries: list[Entry] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)

    def add(self, key: str, value: Any, place: str) -> None:
        """Add one entry."""
        self.entries.append(Entry(key, value, place))

    def miss(self, place: str, text: str, why: str) -> None:
        """Add one thing that could not be read."""
        self.unread.append(Unread(place, text, why))

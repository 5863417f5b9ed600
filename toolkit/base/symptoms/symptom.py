"""The class ``Symptom`` (a known failure), and the patterns that recognise its error texts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_PLACEHOLDERS = {
    "{n}": r"(\d[\d.]*)",
    "{w}": r"([^\s,;'\"`]+)",
    "{..}": r".{0,300}?",
    "{....}": r".{0,4000}?",
}
_PLACEHOLDER = re.compile(r"(\{(?:n|w|\.\.|\.\.\.\.)\})")
# number of characters searched on either side of a text's longest literal part
DEFAULT_WINDOW, LONG_WINDOW = 700, 5000
_MAX_OCCURRENCES = (
    12  # number of occurrences checked from the start, and the same number from the end
)


@dataclass(frozen=True, slots=True)
class Symptom:
    """One known failure.

    ``check`` says what finds the failure before any GPU time is used: checks, rules, or a part of
    ``envcheck size``. If nothing finds the failure beforehand, ``check`` is ``none: `` and the
    reason. ``exit_code`` is one of ``base.errors.EXIT_CODES`` and shows who must act.
    """

    id: str
    title: str
    check: str
    remedy: str
    exit_code: int

    @property
    def has_check(self) -> bool:
        """Whether some check, rule or command finds this failure beforehand."""
        return not self.check.startswith("none: ")

    def with_values(self, **values: str | int) -> Symptom:
        """Return a copy of this symptom with other values for the fields that the keywords name.
        For example, ``with_values(title="...")`` replaces the title. The functions ``add_details``
        of the entries use this method to add the numbers of an error text to the symptom.
        """
        return replace(self, **values)  # type: ignore[arg-type]


class TextPattern:
    """The pattern of one error text of another library. ``{n}`` stands for a number, ``{w}`` for a
    word, ``{..}`` for up to 300 characters, and ``{....}`` for up to 4000. Everything else is
    literal. Case is ignored.

    ``anchor`` is the longest literal part. It is searched first, because a plain search is fast.
    The whole pattern is tried only around the places where ``anchor`` occurs.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        parts = _PLACEHOLDER.split(text)
        self.anchor = max(parts[::2], key=len).lower().strip()
        self.window = LONG_WINDOW if "{....}" in text else DEFAULT_WINDOW
        self._parts = parts

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The compiled regular expression. It is compiled on first use, when a text contains
        ``anchor``, and not at import, so that imports stay fast.
        """
        joined = "".join(
            _PLACEHOLDERS[part] if part in _PLACEHOLDERS else re.escape(part)
            for part in self._parts
        )
        return re.compile(joined, re.IGNORECASE | re.DOTALL)

    def find(self, text: str, lowered: str) -> tuple[re.Match[str], str] | None:
        """Find this pattern in ``text``. Return (match, the text from the beginning of the match);
        None if there is no match. ``lowered`` is ``text`` in lower case.
        """
        for position in find_occurrences(lowered, self.anchor):
            context = text[max(0, position - self.window) : position + self.window]
            if match := self.pattern.search(context):
                return match, context[match.start() :]
        return None

    @property
    def words(self) -> frozenset[str]:
        """The words in the literal parts of this pattern."""
        return words_in(" ".join(self._parts[::2]))


def words_in(text: str) -> frozenset[str]:
    """The words in ``text`` with three or more letters, in lower case."""
    return frozenset(re.findall(r"[a-z_]{3,}", text.lower()))


def find_occurrences(text: str, needle: str) -> list[int]:
    """The positions of ``needle`` in ``text``: at most the first dozen and the last dozen."""
    positions: list[int] = []
    position = text.find(needle)
    while position >= 0 and len(positions) < _MAX_OCCURRENCES:
        positions.append(position)
        position = text.find(needle, position + 1)
    last = text.rfind(needle) if position >= 0 else -1
    for _ in range(_MAX_OCCURRENCES):
        if last <= positions[-1] if positions else last < 0:
            break
        positions.append(last)
        last = text.rfind(needle, 0, last)
    return positions


@dataclass(frozen=True, slots=True)
class Entry:
    """A symptom, with the patterns of the error texts that show it.

    ``add_details`` is a function that reads the numbers in an error text and adds them to the
    symptom. ``unless`` contains ids of other symptoms. If one of them is found in the same text,
    this entry is ignored, because the other symptom explains the text better.
    """

    symptom: Symptom
    texts: tuple[TextPattern, ...]
    add_details: Callable[[Symptom, re.Match[str], str], Symptom] | None = None
    unless: frozenset[str] = frozenset()

    def find(self, text: str, lowered: str) -> Symptom | None:
        """Return the symptom if one of its patterns occurs in ``text``, else None. The patterns are
        tried in the order of ``texts``. ``add_details`` reads the first match. ``lowered`` is
        ``text`` in lower case.
        """
        for pattern in self.texts:
            if result := pattern.find(text, lowered):
                return self.add_details(self.symptom, *result) if self.add_details else self.symptom
        return None


def entry(  # noqa: PLR0913 - a row of a table
    symptom_id: str,
    title: str,
    check: str,
    remedy: str,
    exit_code: int,
    *texts: str,
    add_details: Callable[[Symptom, re.Match[str], str], Symptom] | None = None,
    unless: tuple[str, ...] = (),
) -> Entry:
    """Create one ``Entry`` from the fields of its symptom and the patterns of its error texts."""
    symptom = Symptom(symptom_id, title, check, remedy, exit_code)
    return Entry(
        symptom, tuple(TextPattern(text) for text in texts), add_details, frozenset(unless)
    )

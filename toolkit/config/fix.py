"""Apply fixes. Only scalars and keys that a finding names are changed or moved; comments and order
stay. If several fixes are possible, the user chooses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from toolkit.config.layers import assemble
from toolkit.config.validate import Validation, validate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.finding import Edit, Finding, Fix
    from toolkit.config.rules import Situation
    from toolkit.config.source import Source

# The number of characters that may be validated again in search of fixes. This allows hundreds of
# tries for a usual run file and a few for a huge one, within one or two seconds.
MAX_JUDGED = 600_000
_KEY = re.compile(r"""["'\w.-]+[ \t]*[:=][ \t]*$""")
OVERHEAD = 500  # the fixed cost of one validation, as a number of characters


@dataclass(frozen=True, slots=True)
class Applied:
    """An edit that was applied. ``line`` is the line in the text before any edit."""

    rule: str
    line: int
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Repair:
    """The text with all fixes, the applied edits, and the findings with more than one fix."""

    source: Source
    applied: tuple[Applied, ...]
    choices: tuple[Finding, ...]


def fix_source(source: Source, overrides: Sequence[str], situation: Situation) -> Repair:
    """Apply each fix that is the only one of its finding and changes only this text.

    Fixes are tried one finding at a time. A fix that would only cause a different finding is not
    applied. If a finding offers several fixes, none is applied.
    """
    return _Fixer(overrides, situation).run(source)


class _Fixer:
    def __init__(self, overrides: Sequence[str], situation: Situation) -> None:
        self.overrides, self.situation = overrides, situation
        self.left = MAX_JUDGED

    def run(self, source: Source) -> Repair:
        applied: list[Applied] = []
        # lines[i] is the line in the first text of the current line i + 1
        lines = list(range(1, len(source.lines) + 1))
        now = self.judge(source)
        while True:
            for found in now.findings:
                step = self.improved(source, found, now)
                if step is not None:
                    applied += _told(found, lines)
                    lines = _renumbered(source.text, found.fixes[0].edits, lines)
                    source, now = step
                    break
            else:
                return Repair(source, tuple(applied), _choices(source, now))

    def judge(self, source: Source) -> Validation:
        self.left -= len(source.text) + OVERHEAD
        return validate(assemble(source, self.overrides), self.situation)

    def improved(
        self, source: Source, found: Finding, now: Validation
    ) -> tuple[Source, Validation] | None:
        """The text after the fix of ``found``. None if the finding has several fixes or if the fix
        does not help.
        """
        if len(found.fixes) != 1 or self.left < 0:
            return None
        edits = found.fixes[0].edits
        if not edits or any(edit.source is not source for edit in edits):
            return None
        candidate = replace(source, text=apply(source.text, edits), hidden=[])
        after = self.judge(candidate)
        # If no rule could use the old value, the fixed value may cause another finding.
        allowed = len(now.findings) - (0 if found.rule.startswith("KEY") else 1)
        if len(after.findings) <= allowed and not _same(found, after):
            return candidate, after
        return None


def _same(found: Finding, after: Validation) -> bool:
    return any(
        other.rule == found.rule and other.path == found.path and other.message == found.message
        for other in after.findings
    )


def _choices(source: Source, now: Validation) -> tuple[Finding, ...]:
    """The findings that have more than one possible fix in this text."""
    return tuple(
        found
        for found in now.findings
        if len(found.fixes) > 1
        and any(edit.source is source for fix in found.fixes for edit in fix.edits)
    )


def _told(found: Finding, lines: list[int]) -> list[Applied]:
    fix: Fix = found.fixes[0]
    text = fix.edits[0].source.text

    def line(edit: Edit) -> int:
        return lines[min(text.count("\n", 0, edit.start), len(lines) - 1)]

    if fix.moved is not None:
        first = fix.edits[0]
        return [Applied(found.rule, line(first), *fix.moved)]
    return [Applied(found.rule, line(edit), *_old_and_new(text, edit)) for edit in fix.edits]


def _old_and_new(text: str, edit: Edit) -> tuple[str, str]:
    """The old and new text of an edit; for a value, with its key."""
    before = text[text.rfind("\n", 0, edit.start) + 1 : edit.start]
    key = _KEY.search(before)
    name = key[0] if key else ""
    return f"{name}{text[edit.start : edit.end]}".strip(), f"{name}{edit.text}".strip()


def _renumbered(text: str, edits: Sequence[Edit], lines: list[int]) -> list[int]:
    """For each line after ``edits``, its line in the first text. An inserted line gets the number
    of the line at which it was inserted.
    """
    after = list(lines)
    for edit in sorted(edits, key=lambda one: one.start, reverse=True):
        at = min(text.count("\n", 0, edit.start), len(after) - 1)
        gone, added = text.count("\n", edit.start, edit.end), edit.text.count("\n")
        after[at : at + gone] = [after[at]] * added
    return after


def apply(text: str, edits: Sequence[Edit]) -> str:
    """``text`` with the edits applied from the end, so that offsets stay valid."""
    for edit in sorted(edits, key=lambda one: one.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text

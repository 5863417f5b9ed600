"""Apply fixes to a run file. Only the scalars and keys that a finding names are changed or moved.
Comments and the order of lines stay unchanged. If a finding has several possible fixes, the user
must choose, and none of these fixes is applied.
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

# The limit of characters that are validated again while trying fixes. It allows hundreds of tries
# for a usual run file and a few for a huge one, within one or two seconds.
MAX_JUDGED = 600_000
_KEY = re.compile(r"""["'\w.-]+[ \t]*[:=][ \t]*$""")
OVERHEAD = 500  # the fixed cost of one validation, as a number of characters


@dataclass(frozen=True, slots=True)
class Applied:
    """An edit that was applied. ``line`` is a line number in the original text."""

    rule: str
    line: int
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Repair:
    """The result of fixing: the new text, the applied edits, and the findings that have several
    fixes (``choices``).
    """

    source: Source
    applied: tuple[Applied, ...]
    choices: tuple[Finding, ...]


def fix_source(source: Source, overrides: Sequence[str], situation: Situation) -> Repair:
    """Fix the problems of ``source`` as far as possible, one finding at a time.

    A fix is applied if it is the only fix of its finding and changes only ``source``. It must also
    reduce the number of findings. For an unknown or invalid key, the number may stay the same,
    because other rules check such a key only after the fix and may report a new finding.
    """
    return _Fixer(overrides, situation).run(source)


class _Fixer:
    def __init__(self, overrides: Sequence[str], situation: Situation) -> None:
        self.overrides, self.situation = overrides, situation
        self.left = MAX_JUDGED

    def run(self, source: Source) -> Repair:
        applied: list[Applied] = []
        # lines[i] is the line number in the original text of the current line i + 1
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
        """Apply the fix of the finding ``found``. Return the new text and its validation. Return
        None if the finding does not have exactly one fix, or if the fix does not reduce the number
        of findings. For a KEY rule, the number of findings may stay the same.
        """
        if len(found.fixes) != 1 or self.left < 0:
            return None
        edits = found.fixes[0].edits
        if not edits or any(edit.source is not source for edit in edits):
            return None
        candidate = replace(source, text=apply(source.text, edits), secret_positions=[])
        after = self.judge(candidate)
        # An unknown or invalid key (KEY rules) was not checked by other rules. After the fix it is
        # checked, so one new finding is allowed.
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
    """Return the findings with several possible fixes, if at least one of these fixes changes the
    text ``source``.
    """
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

    if fix.printed_change is not None:
        first = fix.edits[0]
        return [Applied(found.rule, line(first), *fix.printed_change)]
    return [Applied(found.rule, line(edit), *_old_and_new(text, edit)) for edit in fix.edits]


def _old_and_new(text: str, edit: Edit) -> tuple[str, str]:
    """Return the old text and the new text of an edit. If the edit changes the value of a key, both
    texts include the key.
    """
    before = text[text.rfind("\n", 0, edit.start) + 1 : edit.start]
    key = _KEY.search(before)
    name = key[0] if key else ""
    return f"{name}{text[edit.start : edit.end]}".strip(), f"{name}{edit.text}".strip()


def _renumbered(text: str, edits: Sequence[Edit], lines: list[int]) -> list[int]:
    """Return, for each line of the edited text, its line number in the original text ``text``. An
    inserted line gets the number of the line at which it was inserted.
    """
    after = list(lines)
    for edit in sorted(edits, key=lambda one: one.start, reverse=True):
        at = min(text.count("\n", 0, edit.start), len(after) - 1)
        gone, added = text.count("\n", edit.start, edit.end), edit.text.count("\n")
        after[at : at + gone] = [after[at]] * added
    return after


def apply(text: str, edits: Sequence[Edit]) -> str:
    """Return ``text`` with ``edits`` applied. The last edit in the text is applied first, so that
    the offsets of the other edits stay valid.
    """
    for edit in sorted(edits, key=lambda one: one.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text

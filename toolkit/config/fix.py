"""Apply fixes to a run file. Only the scalars and keys that a finding names are changed or moved.
Comments and the order of lines stay unchanged. If a finding has several possible fixes, the user
must choose, and none of these fixes is applied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from toolkit.config.document_loader import assemble
from toolkit.config.validate import Validation, validate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.finding import Edit, Finding, Fix
    from toolkit.config.rules import Situation
    from toolkit.config.source import Source

# The limit of characters that are validated again while trying fixes. It allows hundreds of tries
# for a usual run file and a few for a huge one, within one or two seconds.
MAX_VALIDATED_CHARACTERS = 600_000
_KEY = re.compile(r"""["'\w.-]+[ \t]*[:=][ \t]*$""")
VALIDATION_OVERHEAD = 500  # the fixed cost of one validation, as a number of characters


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
        self.remaining_characters = MAX_VALIDATED_CHARACTERS

    def run(self, source: Source) -> Repair:
        applied: list[Applied] = []
        # lines[i] is the line number in the original text of the current line i + 1
        lines = list(range(1, len(source.lines) + 1))
        validation = self.validate(source)
        while True:
            for finding in validation.findings:
                improvement = self.try_fix(source, finding, validation)
                if improvement is not None:
                    applied += _describe_applied(finding, lines)
                    lines = _renumber_lines(source.text, finding.fixes[0].edits, lines)
                    source, validation = improvement
                    break
            else:
                return Repair(source, tuple(applied), _findings_with_choices(source, validation))

    def validate(self, source: Source) -> Validation:
        self.remaining_characters -= len(source.text) + VALIDATION_OVERHEAD
        return validate(assemble(source, self.overrides), self.situation)

    def try_fix(
        self, source: Source, finding: Finding, validation: Validation
    ) -> tuple[Source, Validation] | None:
        """Apply the fix of the finding ``finding``. Return the new text and its validation. Return
        None if the fix cannot be used.

        The finding must have exactly one fix, which edits only ``source``. After the fix, this
        finding must be gone, and there must be fewer findings than before. If the finding is about
        an unknown or invalid key (rules KEY...), there may also be as many findings as before.
        """
        if len(finding.fixes) != 1 or self.remaining_characters < 0:
            return None
        edits = finding.fixes[0].edits
        if not edits or any(edit.source is not source for edit in edits):
            return None
        candidate = replace(source, text=apply_edits(source.text, edits), secret_positions=[])
        new_validation = self.validate(candidate)
        # An unknown or invalid key (KEY rules) was not checked by other rules. After the fix it is
        # checked, so one new finding is allowed.
        max_findings = len(validation.findings) - (0 if finding.rule.startswith("KEY") else 1)
        if len(new_validation.findings) <= max_findings and not _is_still_reported(
            finding, new_validation
        ):
            return candidate, new_validation
        return None


def _is_still_reported(finding: Finding, validation: Validation) -> bool:
    return any(
        other.rule == finding.rule
        and other.path == finding.path
        and other.message == finding.message
        for other in validation.findings
    )


def _findings_with_choices(source: Source, validation: Validation) -> tuple[Finding, ...]:
    """Return each finding that has several possible fixes, of which at least one changes the text
    ``source``.
    """
    return tuple(
        finding
        for finding in validation.findings
        if len(finding.fixes) > 1
        and any(edit.source is source for fix in finding.fixes for edit in fix.edits)
    )


def _describe_applied(finding: Finding, lines: list[int]) -> list[Applied]:
    fix: Fix = finding.fixes[0]
    text = fix.edits[0].source.text

    def line(edit: Edit) -> int:
        return lines[min(text.count("\n", 0, edit.start), len(lines) - 1)]

    if fix.printed_change is not None:
        first = fix.edits[0]
        return [Applied(finding.rule, line(first), *fix.printed_change)]
    return [Applied(finding.rule, line(edit), *_old_and_new(text, edit)) for edit in fix.edits]


def _old_and_new(text: str, edit: Edit) -> tuple[str, str]:
    """Return the old text and the new text of an edit. If the edit changes the value of a key, both
    texts include the key.
    """
    before = text[text.rfind("\n", 0, edit.start) + 1 : edit.start]
    key = _KEY.search(before)
    name = key[0] if key else ""
    return f"{name}{text[edit.start : edit.end]}".strip(), f"{name}{edit.text}".strip()


def _renumber_lines(text: str, edits: Sequence[Edit], lines: list[int]) -> list[int]:
    """Return, for each line of the edited text, its line number in the original text ``text``. An
    inserted line gets the number of the line at which it was inserted.
    """
    new_lines = list(lines)
    for edit in sorted(edits, key=lambda item: item.start, reverse=True):
        index = min(text.count("\n", 0, edit.start), len(new_lines) - 1)
        removed, added = text.count("\n", edit.start, edit.end), edit.text.count("\n")
        new_lines[index : index + removed] = [new_lines[index]] * added
    return new_lines


def apply_edits(text: str, edits: Sequence[Edit]) -> str:
    """Return ``text`` with ``edits`` applied. The last edit in the text is applied first, so that
    the offsets of the other edits stay valid.
    """
    for edit in sorted(edits, key=lambda item: item.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text

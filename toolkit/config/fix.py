"""Apply fixes: only scalars that a finding names are rewritten; comments and order stay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.config.layers import assemble
from toolkit.config.validate import Validation, validate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.document import Source
    from toolkit.config.finding import Edit, Finding
    from toolkit.config.rules import Situation

# Characters that may be judged again in search of fixes: hundreds of tries for a usual run file,
# a few for a huge one, a second or two for any.
MAX_JUDGED = 600_000
OVERHEAD = 500  # what judging costs besides, in characters


def fix_source(
    source: Source, overrides: Sequence[str], situation: Situation
) -> tuple[Source, list[Finding]]:
    """The text with every fix applied that rewrites scalars of this file, and what was fixed.

    Fixes are tried one finding at a time, the first way out that removes the finding without a new
    one in its place; what a fix would only trade for another finding stays as it is.
    """
    return _Fixer(overrides, situation).run(source)


class _Fixer:
    def __init__(self, overrides: Sequence[str], situation: Situation) -> None:
        self.overrides, self.situation = overrides, situation
        self.left = MAX_JUDGED

    def run(self, source: Source) -> tuple[Source, list[Finding]]:
        fixed: list[Finding] = []
        now = self.judge(source)
        while True:
            for found in now.findings:
                step = self.improved(source, found, now)
                if step is not None:
                    source, now = step
                    fixed.append(found)
                    break
            else:
                return source, fixed

    def judge(self, source: Source) -> Validation:
        self.left -= len(source.text) + OVERHEAD
        return validate(assemble(source, self.overrides), self.situation)

    def improved(
        self, source: Source, found: Finding, now: Validation
    ) -> tuple[Source, Validation] | None:
        """The text after the first fix of ``found`` that helps; None when none does."""
        for fix in found.fixes:
            own = [edit for edit in fix.edits if edit.source is source]
            if not own or len(own) < len(fix.edits) or self.left < 0:
                continue
            candidate = replace(source, text=apply(source.text, own), hidden=[])
            after = self.judge(candidate)
            # A value that no rule could lean on may show another fault once it is mended.
            allowed = len(now.findings) - (0 if found.rule.startswith("KEY") else 1)
            if len(after.findings) <= allowed and not _same(found, after):
                return candidate, after
        return None


def _same(found: Finding, after: Validation) -> bool:
    return any(
        other.rule == found.rule and other.path == found.path and other.message == found.message
        for other in after.findings
    )


def apply(text: str, edits: Sequence[Edit]) -> str:
    """``text`` with edits made from the end, so that offsets stay true."""
    for edit in sorted(edits, key=lambda one: one.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text

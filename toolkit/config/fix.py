"""Apply fixes: only scalars that a finding names are rewritten; comments and order stay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.config.layers import assemble
from toolkit.config.validate import Validation, validate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.document import Document, Source
    from toolkit.config.finding import Edit, Finding
    from toolkit.config.rules import Situation

MAX_PASSES = 20


def fix_source(
    source: Source, overrides: Sequence[str], situation: Situation
) -> tuple[Source, list[Finding]]:
    """The text with every fix applied that rewrites scalars of this file, and what was fixed.

    Fixes are tried one finding at a time, the first way out that removes the finding without a new
    error in its place; what a fix would only trade for another finding stays as it is.
    """
    fixed: list[Finding] = []
    for _ in range(MAX_PASSES):
        before = _judge(source, overrides, situation)
        step = next(
            (
                (found, better)
                for found in before.findings
                if (better := _improved(source, found, before, (overrides, situation)))
            ),
            None,
        )
        if step is None:
            break
        fixed.append(step[0])
        source = step[1]
    return source, fixed


def _judge(source: Source, overrides: Sequence[str], situation: Situation) -> Validation:
    document: Document = assemble(source, overrides)
    return validate(document, situation)


def _improved(
    source: Source,
    found: Finding,
    before: Validation,
    how: tuple[Sequence[str], Situation],
) -> Source | None:
    """The text after the first fix of ``found`` that helps; None when none does."""
    for fix in found.fixes:
        own = [edit for edit in fix.edits if edit.source is source]
        if not own or len(own) < len(fix.edits):
            continue
        candidate = replace(source, text=apply(source.text, own), hidden=[])
        after = _judge(candidate, *how)
        if len(after.findings) < len(before.findings) and not _same(found, after):
            return candidate
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

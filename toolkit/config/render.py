"""Findings as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.finding import Finding


def render_text(findings: Sequence[Finding]) -> str:
    """Every finding as its head line, the source line, the arithmetic and the fix."""
    return "\n".join(_one(found) for found in findings)


def _one(found: Finding) -> str:
    lines = [f"{found.place}: {found.severity}[{found.rule}] {found.message}"]
    source = found.source
    if (
        source is not None
        and not source.is_override
        and found.mark
        and found.line <= len(source.lines)
    ):
        lines.append(f"{found.line:5d} | {source.lines[found.line - 1]}")
    lines += [f"  {note}" for note in found.notes]
    if found.fixes:
        lines.append("  fix: " + "   or   ".join(fix.text for fix in found.fixes))
    return "\n".join(lines)

"""Convert findings to text for the terminal, to GitHub annotations, and to JSON."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from toolkit.base.secrets import redact
from toolkit.config.finding import Severity
from toolkit.config.source import dotted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from toolkit.config.finding import Finding
    from toolkit.config.source import Position, Source

VERSION = 1
DOCS_VARIABLE = "TOOLKIT_DOCS_URL"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_MAX_LINE_WIDTH = 140
_REDACTION_MARGIN = 600
_HIDDEN = "[hidden]"


def rule_page(rule: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the URL of a rule's documentation page. Return None if the environment variable
    TOOLKIT_DOCS_URL is not set. TOOLKIT_DOCS_URL contains the URL of the documentation's front
    page.
    """
    base = environ.get(DOCS_VARIABLE, "").rstrip("/")
    return f"{base}/reference/rules/{rule}/" if base else None


def _no_color(text: str, _role: str) -> str:
    return text


def _without_controls(text: str) -> str:
    """Return ``text`` with control characters of terminals replaced."""
    return text if text.isprintable() else _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def source_excerpt(source: Source, position: Position) -> str:
    """Return the source line that contains the position ``position``, with secrets hidden. Only the
    part near the position is returned if the line is long.
    """
    line = source.lines[position.line - 1]
    start = position.start - (position.column - 1)
    # Shorten the line twice: first to a width in which no secret near the column is cut apart, so
    # that redaction finds it, and later to the shown width.
    window_start = max(
        0, min(position.column - _REDACTION_MARGIN, len(line) - 2 * _REDACTION_MARGIN)
    )
    line, start = line[window_start : window_start + 2 * _REDACTION_MARGIN], start + window_start
    for secret in sorted(
        source.secret_positions, key=lambda secret_position: secret_position.start, reverse=True
    ):
        first, last = secret.start - start, min(secret.end - start, len(line))
        if last > 0 and first < len(line):
            line = line[: max(first, 0)] + _HIDDEN + line[last:]
    line = _without_controls(line.replace("\t", "    ") if line.startswith("\t") else line)
    if len(line) <= _MAX_LINE_WIDTH and window_start == 0:
        return line  # a complete line is redacted later, together with the rest of the output
    line = redact(line)
    column = min(position.column - window_start, len(line))
    first = max(0, min(column - _MAX_LINE_WIDTH // 2, len(line) - _MAX_LINE_WIDTH))
    before = "..." if first or window_start else ""
    after = (
        "..."
        if first + _MAX_LINE_WIDTH < len(line) or start + 2 * _REDACTION_MARGIN < len(source.text)
        else ""
    )
    return before + line[first : first + _MAX_LINE_WIDTH] + after


def render_text(findings: Sequence[Finding], paint: Callable[[str, str], str] = _no_color) -> str:
    """Return the findings as text. Each finding has a first line, the source line, notes, and
    fixes.

    ``paint(text, role)`` returns ``text`` with the colour of ``role``, which is error, warning or
    place.
    """
    return "\n".join(_render_finding(finding, paint) for finding in findings)


def _render_finding(finding: Finding, paint: Callable[[str, str], str]) -> str:
    label = paint(f"{finding.severity}[{finding.rule}]", str(finding.severity))
    location = paint(_without_controls(finding.location), "place")
    lines = [f"{location}: {label} {_without_controls(finding.message)}"]
    source, position = finding.source, finding.position
    if (
        source is not None
        and position
        and not source.is_override
        and position.line <= len(source.lines)
    ):
        lines.append(f"{position.line:5d} | {source_excerpt(source, position)}")
    lines += [f"  {_without_controls(note)}" for note in finding.notes]
    if finding.fixes:
        lines.append(
            "  fix: " + "   or   ".join(_without_controls(fix.text) for fix in finding.fixes)
        )
    if page := rule_page(finding.rule):
        lines.append(f"  see: {_without_controls(page)}")
    return redact("\n".join(lines))


def render_github(findings: Sequence[Finding]) -> str:
    """Return the findings as GitHub workflow commands, one line per finding (docs.github.com,
    workflow commands for actions).
    """
    return "\n".join(_annotation(finding) for finding in findings)


def _annotation(finding: Finding) -> str:
    body = [finding.message, *finding.notes]
    if finding.fixes:
        body.append("fix: " + " or ".join(fix.text for fix in finding.fixes))
    text = "\n".join(map(redact, body))
    properties = {"file": finding.source.name if finding.source else ""}
    if finding.position:
        properties |= {"line": str(finding.position.line), "col": str(finding.position.column)}
    properties["title"] = finding.rule
    fields = ",".join(f"{key}={_escape(value, ':,')}" for key, value in properties.items())
    return f"::{finding.severity} {fields}::{_escape(text)}"


def _escape(text: str, extra_characters: str = "") -> str:
    for character in "%\r\n" + extra_characters:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def to_json(finding: Finding) -> dict[str, Any]:
    """Return a finding as a JSON object according to findings.schema.json."""
    position = finding.position
    return {
        "rule": finding.rule,
        "severity": str(finding.severity),
        "message": redact(finding.message),
        "key": dotted(finding.path) if finding.path else None,
        "file": redact(finding.source.name) if finding.source else None,
        "line": position.line if position else None,
        "column": position.column if position else None,
        "end_column": end_column(position) if position else None,
        "notes": [redact(note) for note in finding.notes],
        "fixes": [
            {
                "text": redact(fix.text),
                "edits": [
                    {
                        "file": edit.source.name,
                        "start": edit.start,
                        "end": edit.end,
                        "text": edit.text,
                    }
                    for edit in fix.edits
                ],
            }
            for fix in finding.fixes
        ],
        "unknown": finding.unknown,
    }


def end_column(position: Position) -> int:
    """Return the column after the last character of the range ``position``."""
    return position.column + max(position.end - position.start, 0)


def findings_report(files: Sequence[str], findings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the complete output of ``--format json``."""
    severities = [finding["severity"] for finding in findings]
    return {
        "schema": "urn:grpo-toolkit:schema:findings:1",
        "version": VERSION,
        "files": list(files),
        "errors": severities.count(Severity.ERROR),
        "warnings": severities.count(Severity.WARNING),
        "findings": list(findings),
    }

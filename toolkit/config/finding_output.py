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
_WIDEST = 140
_MARGIN = 600
_HIDDEN = "[hidden]"


def rule_page(rule: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the URL of a rule's documentation page. Return None if the environment variable
    TOOLKIT_DOCS_URL is not set. TOOLKIT_DOCS_URL contains the URL of the documentation's front
    page.
    """
    base = environ.get(DOCS_VARIABLE, "").rstrip("/")
    return f"{base}/reference/rules/{rule}/" if base else None


def _plain(text: str, _role: str) -> str:
    return text


def _harmless(text: str) -> str:
    """Return ``text`` with control characters of terminals replaced."""
    return text if text.isprintable() else _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def source_excerpt(source: Source, mark: Position) -> str:
    """Return the source line that contains the position ``mark``, with secrets hidden. Only the
    part near the position is returned if the line is long.
    """
    line = source.lines[mark.line - 1]
    start = mark.start - (mark.column - 1)
    # Shorten the line twice: first to a width in which no secret near the column is cut apart, so
    # that redaction finds it, and later to the shown width.
    low = max(0, min(mark.column - _MARGIN, len(line) - 2 * _MARGIN))
    line, start = line[low : low + 2 * _MARGIN], start + low
    for hidden in sorted(source.secret_positions, key=lambda one: one.start, reverse=True):
        first, last = hidden.start - start, min(hidden.end - start, len(line))
        if last > 0 and first < len(line):
            line = line[: max(first, 0)] + _HIDDEN + line[last:]
    line = _harmless(line.replace("\t", "    ") if line.startswith("\t") else line)
    if len(line) <= _WIDEST and low == 0:
        return line  # a complete line is redacted later, together with the rest of the output
    line = redact(line)
    column = min(mark.column - low, len(line))
    first = max(0, min(column - _WIDEST // 2, len(line) - _WIDEST))
    before = "..." if first or low else ""
    after = "..." if first + _WIDEST < len(line) or start + 2 * _MARGIN < len(source.text) else ""
    return before + line[first : first + _WIDEST] + after


def render_text(findings: Sequence[Finding], paint: Callable[[str, str], str] = _plain) -> str:
    """Return the findings as text. Each finding has a first line, the source line, notes, and
    fixes.

    ``paint(text, role)`` returns ``text`` with the colour of ``role``, which is error, warning or
    place.
    """
    return "\n".join(_one(found, paint) for found in findings)


def _one(found: Finding, paint: Callable[[str, str], str]) -> str:
    label = paint(f"{found.severity}[{found.rule}]", str(found.severity))
    place = paint(_harmless(found.location), "place")
    lines = [f"{place}: {label} {_harmless(found.message)}"]
    source, mark = found.source, found.position
    if source is not None and mark and not source.is_override and mark.line <= len(source.lines):
        lines.append(f"{mark.line:5d} | {source_excerpt(source, mark)}")
    lines += [f"  {_harmless(note)}" for note in found.notes]
    if found.fixes:
        lines.append("  fix: " + "   or   ".join(_harmless(fix.text) for fix in found.fixes))
    if page := rule_page(found.rule):
        lines.append(f"  see: {_harmless(page)}")
    return redact("\n".join(lines))


def render_github(findings: Sequence[Finding]) -> str:
    """Return the findings as GitHub workflow commands, one line per finding (docs.github.com,
    workflow commands for actions).
    """
    return "\n".join(_annotation(found) for found in findings)


def _annotation(found: Finding) -> str:
    body = [found.message, *found.notes]
    if found.fixes:
        body.append("fix: " + " or ".join(fix.text for fix in found.fixes))
    text = "\n".join(map(redact, body))
    place = {"file": found.source.name if found.source else ""}
    if found.position:
        place |= {"line": str(found.position.line), "col": str(found.position.column)}
    place["title"] = found.rule
    fields = ",".join(f"{key}={_escape(value, ':,')}" for key, value in place.items())
    return f"::{found.severity} {fields}::{_escape(text)}"


def _escape(text: str, also: str = "") -> str:
    for character in "%\r\n" + also:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def to_json(found: Finding) -> dict[str, Any]:
    """Return a finding as a JSON object according to findings.schema.json."""
    mark = found.position
    return {
        "rule": found.rule,
        "severity": str(found.severity),
        "message": redact(found.message),
        "key": dotted(found.path) if found.path else None,
        "file": redact(found.source.name) if found.source else None,
        "line": mark.line if mark else None,
        "column": mark.column if mark else None,
        "end_column": end_column(mark) if mark else None,
        "notes": [redact(note) for note in found.notes],
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
            for fix in found.fixes
        ],
        "unknown": found.unknown,
    }


def end_column(mark: Position) -> int:
    """Return the column after the last character of the range ``mark``."""
    return mark.column + max(mark.end - mark.start, 0)


def findings_report(files: Sequence[str], findings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the complete output of ``--format json``."""
    severities = [found["severity"] for found in findings]
    return {
        "schema": "urn:grpo-toolkit:schema:findings:1",
        "version": VERSION,
        "files": list(files),
        "errors": severities.count(Severity.ERROR),
        "warnings": severities.count(Severity.WARNING),
        "findings": list(findings),
    }

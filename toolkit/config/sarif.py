"""Convert findings to SARIF 2.1.0 (docs.oasis-open.org/sarif), for code-scanning services and
editors.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from toolkit.base.secrets import redact
from toolkit.base.version import __version__
from toolkit.config.finding_output import end_column, rule_page
from toolkit.config.rules import all_rules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.finding import Finding, Fix
    from toolkit.config.source import Position, Source

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif_log(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a SARIF log with one run of envcheck. ``results`` are SARIF result objects, as the
    function ``sarif_result`` returns them.
    """
    used = {result["ruleId"] for result in results}
    rules = [rule for name, rule in all_rules().items() if name in used]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "envcheck",
                        "version": __version__,
                        "rules": [
                            {
                                "id": rule.id,
                                "shortDescription": {"text": rule.summary},
                                "fullDescription": {"text": rule.why or rule.summary},
                                "help": {"text": f"envcheck explain {rule.id}\nfix: {rule.fix}"},
                                "defaultConfiguration": {"level": str(rule.severity)},
                                **_help_uri(rule.id),
                            }
                            for rule in rules
                        ],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": list(results),
            }
        ],
    }


def _help_uri(rule: str) -> dict[str, str]:
    page = rule_page(rule)
    return {} if page is None else {"helpUri": page}


def sarif_result(finding: Finding) -> dict[str, Any]:
    """Return a finding as a SARIF result object."""
    text = "\n".join(map(redact, (finding.message, *finding.notes)))
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "level": str(finding.severity),
        "message": {"text": text},
        "locations": [_location(finding.source, finding.position)],
    }
    related = [_location(node.source, node.position) for node in finding.related]
    if related:
        result["relatedLocations"] = related
    fixes = [_fix(fix) for fix in finding.fixes if fix.edits]
    if fixes:
        result["fixes"] = fixes
    return result


def _artifact(source: Source | None) -> dict[str, str]:
    name = redact(source.name) if source is not None else "run file"
    return {"uri": PurePath(name).as_posix().replace("%", "%25").replace(" ", "%20")}


def _location(source: Source | None, position: Position | None) -> dict[str, Any]:
    # Code scanning services require a line. A finding about the whole file gets line 1.
    region = {"startLine": 1}
    if position is not None:
        region = {"startLine": position.line, "startColumn": position.column}
        if source is not None and "\n" not in source.text[position.start : position.end]:
            region["endColumn"] = max(end_column(position), position.column)
    return {"physicalLocation": {"artifactLocation": _artifact(source), "region": region}}


def _fix(fix: Fix) -> dict[str, Any]:
    return {
        "description": {"text": redact(fix.text)},
        "artifactChanges": [
            {
                "artifactLocation": _artifact(edit.source),
                "replacements": [
                    {
                        "deletedRegion": {
                            "charOffset": edit.start,
                            "charLength": edit.end - edit.start,
                        },
                        "insertedContent": {"text": edit.text},
                    }
                ],
            }
            for edit in fix.edits
        ],
    }

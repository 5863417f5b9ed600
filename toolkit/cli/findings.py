"""Print and count the findings of ``envcheck validate``. Each output format has its own class."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from toolkit.base.formatting import escape_unprintable, plural
from toolkit.base.secrets import redact
from toolkit.cli.render import styled, uses_colours
from toolkit.config.finding import Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.finding import Finding
    from toolkit.config.fix import Repair

_COLOURS = {"error": "red", "warning": "yellow", "place": None}


class Printer:
    """The base class of the output formats. It counts the findings; a subclass prints them."""

    def __init__(self) -> None:
        self.errors = self.warnings = 0
        self.has_unreadable_file = False
        self.all_errors_unknown = True

    def add(self, finding: Finding) -> None:
        if finding.severity is Severity.ERROR:
            self.errors += 1
            self.all_errors_unknown &= finding.unknown
        else:
            self.warnings += 1
        self.has_unreadable_file |= finding.rule == "DOC014"
        self.show(finding)

    def show(self, finding: Finding) -> None:
        raise NotImplementedError

    def end(self, names: list[str]) -> None:
        raise NotImplementedError

    @property
    def exit_code(self) -> int:
        """The exit code of ``envcheck validate`` for all findings: 2 if a file could not be read,
        else 5 if all errors mean that something could not be checked, else 1 if there is an error,
        else 0.
        """
        if self.has_unreadable_file:
            return 2
        if self.errors:
            return 5 if self.all_errors_unknown else 1
        return 0


class TextPrinter(Printer):
    """Print findings as text for people, with colours on a terminal."""

    def show(self, finding: Finding) -> None:
        from toolkit.config.finding_output import render_text  # noqa: PLC0415 - only for a finding

        if uses_colours():
            click.echo(
                render_text([finding], lambda text, role: styled(text, _COLOURS[role], bold=True))
            )
        else:
            click.echo(render_text([finding]))

    def end(self, names: list[str]) -> None:
        counts = [
            plural(count, word)
            for count, word in ((self.errors, "error"), (self.warnings, "warning"))
            if count
        ]
        counts_text = " and ".join(counts) or "no findings"
        click.echo(
            f"{counts_text} in {names[0] if len(names) == 1 else plural(len(names), 'file')}"
        )


class GithubPrinter(Printer):
    """Print findings as annotations of GitHub Actions."""

    def show(self, finding: Finding) -> None:
        from toolkit.config.finding_output import render_github  # noqa: PLC0415

        click.echo(render_github([finding]))

    def end(self, names: list[str]) -> None:
        del names


class DocumentPrinter(Printer):
    """Collect findings for JSON and SARIF. Each of these formats is one document, which is printed
    at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, Any]] = []

    def dump(self, value: dict[str, Any]) -> None:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))


class JsonPrinter(DocumentPrinter):
    """Print all findings as one JSON object."""

    def show(self, finding: Finding) -> None:
        from toolkit.config.finding_output import to_json  # noqa: PLC0415

        self.entries.append(to_json(finding))

    def end(self, names: list[str]) -> None:
        from toolkit.config.finding_output import findings_report  # noqa: PLC0415

        self.dump(findings_report(names, self.entries))


class SarifPrinter(DocumentPrinter):
    """Print all findings as one SARIF log."""

    def show(self, finding: Finding) -> None:
        from toolkit.config.sarif import sarif_result  # noqa: PLC0415

        self.entries.append(sarif_result(finding))

    def end(self, names: list[str]) -> None:
        from toolkit.config.sarif import sarif_log  # noqa: PLC0415

        del names
        self.dump(sarif_log(self.entries))


PRINTERS: dict[str, type[Printer]] = {
    "text": TextPrinter,
    "json": JsonPrinter,
    "sarif": SarifPrinter,
    "github": GithubPrinter,
}


def applied_edit_lines(name: str, repair: Repair) -> Iterator[str]:
    """Yield a line for each edit that --fix made in the file ``name``, then a line with the number
    of edits.

    The line numbers are those of the file before the edits.
    """
    for edit in repair.applied:
        text = f"{name}:{edit.line}: {edit.old} -> {edit.new} ({edit.rule})"
        yield redact(escape_unprintable(text))
    yield f"{name}: {plural(len(repair.applied), 'edit')} made"


def unfixed_finding_lines(repair: Repair) -> Iterator[str]:
    """Yield a line for each finding that --fix did not fix, because the finding has several
    possible fixes.
    """
    for finding in repair.choices:
        fixes = " or ".join(fix.text for fix in finding.fixes)
        text = f"{finding.location}: {finding.rule} is not fixed, choose one of: {fixes}"
        yield redact(escape_unprintable(text))

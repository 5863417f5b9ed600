"""``toolkit import FILE``: turn the config, script or notebook of another tool into a run file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.base.errors import ConfigError
from toolkit.base.formatting import escape_unprintable, plural
from toolkit.base.secrets import redact
from toolkit.config.importers.formats import TABLE_MODULES

if TYPE_CHECKING:
    from toolkit.config.finding import Finding
    from toolkit.config.importers.mapping import Translation

STDOUT = "-"


def _print_table(context: click.Context, _: click.Parameter, format_name: str | None) -> None:
    if format_name is None or context.resilient_parsing:
        return
    from toolkit.config.importers.write import table_markdown  # noqa: PLC0415 - only for --table

    click.echo(table_markdown(format_name), nl=False)
    context.exit()


@click.command("import")
@click.argument("file", metavar="FILE")
@click.option(
    "--to",
    metavar="RUN.YAML",
    help="The run file to write (default: FILE-run.yaml in the folder of FILE; - for stdout).",
)
@click.option(
    "--from",
    "format_name",
    type=click.Choice(list(TABLE_MODULES)),
    help="The format of FILE (default: detected from its content).",
)
@click.option(
    "--table",
    type=click.Choice(list(TABLE_MODULES)),
    is_eager=True,
    expose_value=False,
    callback=_print_table,
    help="Print a Markdown table that shows how each key of this format is imported, and exit.",
)
@click.option("--force", is_flag=True, help="Replace an existing run file.")
@click.option(
    "--strict",
    is_flag=True,
    help="Fail if a setting of FILE was refused (exit 1) or could not be read (exit 5).",
)
def import_config(
    file: str, to: str | None, format_name: str | None, force: bool, strict: bool
) -> None:
    """Write a run file from FILE, a config of axolotl, TRL, Unsloth, verl, prime-rl or ms-swift.

    FILE can be YAML, TOML, JSON, a shell script with a command line, a Python script or a notebook.
    FILE is only read, never executed. A comment on each line of the run file names the setting of
    FILE that the line comes from. Comments at the end of the run file list the settings that were
    left out, were refused or could not be read. Then the run file is validated.

    Exit codes: 0 the run file is valid; 1 the run file must change before it can run, or (with
    --strict) a setting was refused; 2 FILE cannot be read; 5 (with --strict) a setting could not be
    read.
    """
    from toolkit.config.importers import read_foreign_config, run_file_text, translate  # noqa: PLC0415
    from toolkit.config.importers.formats import load_table  # noqa: PLC0415 - after parsing

    foreign = read_foreign_config(file, format_name)
    translation = translate(foreign, load_table(foreign.format_name))
    text = run_file_text(translation, "standard input" if file == STDOUT else Path(file).name)
    output_path = _output_path(file, to)
    if output_path is None:
        click.echo(text, nl=False)
    else:
        _write_run_file(output_path, text, force=force)
    findings = _validate_text(text, output_path)
    for line in _summary_lines(translation, output_path):
        click.echo(line, err=True)
    _print_findings(findings)
    raise SystemExit(_exit_code(translation, findings, strict=strict))


def _output_path(file: str, to: str | None) -> Path | None:
    """Return the path of the run file to write; None for standard output."""
    if to == STDOUT or (to is None and file == STDOUT):
        return None
    if to is not None:
        return Path(to)
    path = Path(file)
    return path.with_name(f"{path.stem}-run.yaml")


def _write_run_file(path: Path, text: str, *, force: bool) -> None:
    from toolkit.base.paths import write_file  # noqa: PLC0415 - after the file was read
    from toolkit.cli.exit_codes import report_write_errors  # noqa: PLC0415 - as above

    if path.exists() and not force:
        raise ConfigError(
            "the run file exists already",
            where=str(path),
            fix="choose another file with `--to`, or replace the existing file with `--force`",
        )
    with report_write_errors(path):
        write_file(path, text)


def _validate_text(text: str, path: Path | None) -> tuple[Finding, ...]:
    from toolkit.config.document_loader import assemble, load_document  # noqa: PLC0415 - as above
    from toolkit.config.source import Source  # noqa: PLC0415 - after the file was read
    from toolkit.config.validate import validate  # noqa: PLC0415 - as above

    if path is not None:
        return validate(load_document(path)).findings
    return validate(assemble(Source("the run file", text, Path.cwd()))).findings


def _summary_lines(translation: Translation, path: Path | None) -> list[str]:
    where = "" if path is None else f"wrote {path}: "
    lines = [
        f"{where}{plural(len(translation.run_values) + len(translation.rewards), 'key')} from "
        f"{translation.table.title}, {len(translation.left_out)} left out, "
        f"{len(translation.refused)} refused, {len(translation.unread)} could not be read"
    ]
    lines += [f"  note: {note}" for note in translation.notes]
    lines += [
        f"  refused: {one.location}: {one.key}: {one.value} - {one.why}"
        for one in translation.refused
    ]
    lines += [
        f"  could not be read: {one.location}: {one.text} - {one.why}" for one in translation.unread
    ]
    return [
        redact(escape_unprintable(" ".join(line.split()) if line[:1] != " " else line))
        for line in lines
    ]


def _print_findings(findings: tuple[Finding, ...]) -> None:
    from toolkit.config.finding_output import render_text  # noqa: PLC0415 - after the file was read

    if findings:
        click.echo(render_text(findings), err=True)


def _exit_code(translation: Translation, findings: tuple[Finding, ...], *, strict: bool) -> int:
    from toolkit.config.finding import Severity  # noqa: PLC0415 - after the file was read

    if any(finding.severity is Severity.ERROR for finding in findings):
        return 1
    if strict and translation.refused:
        return 1
    return 5 if strict and translation.unread else 0

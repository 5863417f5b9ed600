"""``envcheck record`` and ``envcheck replay``: write the facts about a node to a file, and run the
checks on this file on another machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.base.formatting import plural
from toolkit.cli.check import format_results, request_options
from toolkit.cli.exit_codes import report_write_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.gpu.checks import CheckResult


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@request_options
def record(file: Path, **request: Any) -> None:
    """Write all raw readings of this node to FILE, for a bug report. Names and secrets are removed.

    UUIDs are replaced by invented UUIDs and pids by small numbers. Names of processes, users and
    hosts are removed. Of the environment variables, only those that checks read are kept.
    """
    from toolkit.base.paths import write_named_file  # noqa: PLC0415 - after the arguments are parsed
    from toolkit.cli.check_request import check_node  # noqa: PLC0415 - as above
    from toolkit.gpu.record import make_recording  # noqa: PLC0415 - as above

    snapshot, context, results = check_node(**request)
    with report_write_errors(file):
        write_named_file(
            file, json.dumps(make_recording(snapshot, context, results), indent=1) + "\n"
        )
    click.echo(
        f"{file}: {plural(len(snapshot.gpus), 'GPU')}, {plural(len(results), 'check')}, "
        f"without names and secrets. Read the file before you send it. `envcheck replay {file}` "
        "repeats the checks on any machine."
    )


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--node", is_flag=True, help="Check only the node's health.")
@click.option(
    "--strict", is_flag=True, help="Treat a check that cannot be completed as a failure (exit 5)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (report.schema.json).")
@click.option("-v", "--verbose", is_flag=True, help="List passed checks too.")
def replay(file: Path, node: bool, strict: bool, as_json: bool, verbose: bool) -> None:
    """Run the checks on FILE, which `envcheck record` wrote. The exit code is that of `envcheck
    check` on the recorded node.
    """
    from dataclasses import replace  # noqa: PLC0415 - after the arguments are parsed

    from toolkit.gpu.checks import run_checks  # noqa: PLC0415 - as above
    from toolkit.gpu.record import parse_recording  # noqa: PLC0415 - as above
    from toolkit.gpu.report import check_report  # noqa: PLC0415 - as above

    snapshot, context, verdicts = parse_recording(_read_recording(file))
    context = replace(context, node=node)
    results = run_checks(snapshot, context)
    report = check_report(snapshot, results, strict=strict, node=node)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(format_results(results, context, snapshot, verbose=verbose, strict=strict))
        click.echo(describe_differences(verdicts, results))
    sys.exit(int(report["exit_code"]))


def _read_recording(file: Path) -> Any:
    from toolkit.base.errors import InputError  # noqa: PLC0415 - as above
    from toolkit.base.files import read_json  # noqa: PLC0415 - as above
    from toolkit.config.validate import check_instance  # noqa: PLC0415 - as above
    from toolkit.gpu.record import MAX_RECORDING_BYTES  # noqa: PLC0415 - as above

    data = read_json(file, limit=MAX_RECORDING_BYTES)
    faults = check_instance(data, "report") if isinstance(data, dict) else ["$: not an object"]
    if faults:
        raise InputError(
            f"{file} is not a recording: {faults[0][:300]}",
            fix="create a recording with `envcheck record FILE`",
        )
    return data


def describe_differences(recorded_verdicts: dict[str, str], results: Sequence[CheckResult]) -> str:
    """Return a text that lists each check whose verdict now differs from its verdict in the
    recording.
    """
    current_verdicts = {result.id: result.verdict for result in results}
    compared_ids = recorded_verdicts.keys() & current_verdicts.keys()
    changed = [
        f"{name}: {recorded_verdicts[name]} then, {current_verdicts[name]} now"
        for name in sorted(compared_ids)
        if recorded_verdicts[name] != current_verdicts[name]
    ]
    if not changed:
        return f"as recorded: {plural(len(compared_ids), 'verdict')} compared"
    return "verdicts that differ from the recording:\n  " + "\n  ".join(changed)

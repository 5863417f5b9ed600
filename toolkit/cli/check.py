"""``envcheck check``: check whether this node can run a job; with ``--node``, check only the health
of the node.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.base.formatting import plural
from toolkit.cli.exit_codes import report_write_errors
from toolkit.cli.render import styled, verdict_word, wrap_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from toolkit.gpu.checks import CheckContext, CheckResult
    from toolkit.gpu.snapshot import NodeSnapshot


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``command`` with the options that ``envcheck check`` and ``envcheck record`` have in
    common. These options describe what a job requires of the node.
    """
    options = (
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="RUN.YAML",
            help="Check the node for this run file.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a key of the run file, as in `toolkit train`. Repeatable.",
        ),
        click.option(
            "--gpu-index",
            type=click.IntRange(min=0),
            metavar="N",
            help="Check the GPU with the CUDA index N.",
        ),
        click.option(
            "--require",
            multiple=True,
            metavar="WHAT",
            help="Fail if this requirement is not met. Forms: 8 (the number of GPUs), gpu (any "
            "GPU), h200 (a card), cc>=9.0 (compute capability), free>=40GiB (free GPU memory), "
            "driver>=580. Repeatable.",
        ),
        click.option(
            "--lock",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Compare the installed packages with a requirements file that has == pins.",
        ),
        click.option(
            "--only",
            multiple=True,
            metavar="CHECK",
            help="Run only the check with this id, or only this family of checks. Repeatable.",
        ),
        click.option(
            "--skip",
            multiple=True,
            metavar="CHECK",
            help="Do not run the check with this id, or this family of checks. Repeatable.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@request_options
@click.option(
    "--node", is_flag=True, help="Check only the health of the node, as in a scheduler's prolog."
)
@click.option(
    "--strict", is_flag=True, help="Treat a check that cannot be completed as a failure (exit 5)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (report.schema.json).")
@click.option(
    "--prometheus",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write metrics for node_exporter's textfile collector.",
)
@click.option("-v", "--verbose", is_flag=True, help="List passed checks too.")
def check(
    node: bool,
    strict: bool,
    as_json: bool,
    prometheus: Path | None,
    verbose: bool,
    **request: Any,
) -> None:
    """Check that this node can run the job.

    The command changes nothing on the node, and it needs no privileges. Exit codes: 0 the node can
    run the job; 1 the run file or the options must change; 3 this node is bad; 4 try again later; 5
    (with --strict) a check could not be completed. With --node, only a bad node (3) is a failure. A
    run that needs no GPU passes on a node without a GPU.
    """
    from toolkit.base.paths import write_named_file  # noqa: PLC0415 - after the arguments are parsed
    from toolkit.cli.check_request import check_node  # noqa: PLC0415 - as above
    from toolkit.gpu.prometheus import format_metrics  # noqa: PLC0415 - as above
    from toolkit.gpu.report import check_report  # noqa: PLC0415 - as above

    snapshot, context, results = check_node(**request, node=node)
    report = check_report(snapshot, results, strict=strict, node=node)
    code = int(report["exit_code"])
    if prometheus is not None:
        with report_write_errors(prometheus):
            write_named_file(prometheus, format_metrics(snapshot, results, code))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(format_results(results, context, snapshot, verbose=verbose, strict=strict))
    sys.exit(code)


def format_results(
    results: Sequence[CheckResult],
    context: CheckContext,
    snapshot: NodeSnapshot,
    *,
    verbose: bool,
    strict: bool = False,
) -> str:
    """Return the output for people. It has a paragraph for each finding with its remedy, then the
    passed checks (with ``verbose``), then the counts.
    """
    from toolkit.gpu.checks import checks_by_id, exit_code  # noqa: PLC0415 - as above

    order = {"fail": 0, "unknown": 1, "warn": 2, "ok": 3}
    width = max((len(result.id) for result in results), default=0)
    lines = []
    for result in sorted(results, key=lambda one: order[one.verdict]):
        if result.verdict == "ok" and not verbose:
            continue
        first = f"{verdict_word(result.verdict)} {result.id:<{width}}  "
        indent = " " * (7 + 1 + width + 2)
        # The text is wrapped with spaces in place of ``first``, because the escape codes of a
        # coloured word would count as columns.
        text = wrap_text(result.evidence, first=" " * len(indent), indent=indent).lstrip()
        lines.append(first + text)
        if result.remedy:
            lines.append(wrap_text(result.remedy, first=f"{indent}fix: ", indent=f"{indent}     "))
    counts = dict.fromkeys(order, 0)
    for result in results:
        counts[result.verdict] += 1
    code = exit_code(results, strict=strict, node=context.node)
    summary = f"{plural(len(results), 'check')}: {counts['ok']} ok"
    summary += "".join(
        f", {plural(counts[verdict], word) if word != 'unknown' else f'{counts[verdict]} unknown'}"
        for verdict, word in (("warn", "warning"), ("fail", "failure"), ("unknown", "unknown"))
        if counts[verdict]
    )
    unchecked_count = len(checks_by_id()) - len(results)
    summary += (
        f" ({unchecked_count} not selected or not applicable here)" if unchecked_count else ""
    )
    meaning = EXIT_CODE_MEANINGS[code] if code else readiness_text(snapshot, context)
    lines.append(styled(f"{summary}. {meaning}", "red" if code else "green", bold=True))
    return "\n".join(lines)


def readiness_text(snapshot: NodeSnapshot, context: CheckContext) -> str:
    """Return a text for a node on which no check failed: for which runs the node is ready. A node
    without a GPU is ready only for runs on the CPU.
    """
    from toolkit.gpu.devices import visible_devices  # noqa: PLC0415 - after parsing

    if visible_devices(snapshot).devices:
        return "Ready."
    if context.configured:
        return "Ready for this run on the CPU (there is no GPU)."
    return "Ready for runs on the CPU (there is no GPU)."


EXIT_CODE_MEANINGS = {
    1: "Change the run file or the options (exit 1).",
    3: "This node is bad; another node may work (exit 3).",
    4: "Try again later (exit 4).",
    5: "Some checks could not be completed, and --strict requires all (exit 5).",
}

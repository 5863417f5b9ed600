"""``envcheck validate``: print every error in run files, with its position, the calculation that
shows the error, and the fix.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from toolkit.base.errors import InputError
from toolkit.cli.findings import PRINTERS, applied_edit_lines, unfixed_finding_lines
from toolkit.config.document_loader import load_document
from toolkit.config.finding import Finding, Severity
from toolkit.config.rules import DeviceFacts, Situation
from toolkit.config.validate import validate as validate_document

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.document import Document
    from toolkit.config.validate import Validation
    from toolkit.gpu.cards import Card


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The options of the command line."""

    strict: bool
    fix: bool
    overrides: tuple[str, ...]
    situation: Situation
    card: Card | None


@click.command("validate")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(list(PRINTERS)),
    default="text",
    show_default=True,
    help="Output format of the findings.",
)
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@click.option(
    "--fix",
    is_flag=True,
    help=(
        "Apply the fix of each finding that has exactly one fix, and print each edit of the file."
    ),
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the run file, as in `toolkit train`. Repeatable.",
)
@click.option(
    "--world-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Validate for a run with this number of processes, one per GPU.",
)
@click.option(
    "--gpu",
    metavar="NAME|none",
    help="Validate for this card (h200, a100-40, t4 ...). `none` is a machine without a GPU.",
)
def validate(files: tuple[str, ...], output_format: str, **options: Any) -> None:
    """Find every error in run files. FILE is a YAML, JSON or TOML file, a folder, a glob pattern,
    or - for standard input.

    No model is loaded and nothing is downloaded. Exit codes: 0 no error; 1 the file must change; 2
    a file cannot be read; 5 (only with --strict) something could not be checked on this machine.
    `envcheck explain RULE` explains a finding. If TOOLKIT_DOCS_URL is set, each finding contains
    the address of its page in the documentation (in SARIF: helpUri).
    """
    request = _parse_options(options)
    printer = PRINTERS[output_format]()
    names: list[str] = []
    for name in expand_arguments(files):
        names.append(name)
        for finding in _findings_of_file(name, request):
            printer.add(finding)
    printer.end(names)
    raise SystemExit(printer.exit_code)


def _parse_options(options: dict[str, Any]) -> _Options:
    gpu, card = options["gpu"], None
    device = None
    if gpu == "none":
        device = DeviceFacts("no GPU", None)
    elif gpu is not None:
        from toolkit.gpu.cards import find_card  # noqa: PLC0415 - only for --gpu

        card = find_card(gpu)
        device = DeviceFacts(card.name, card.compute_capability, card.machine)
    situation = Situation(world_size=options["world_size"], device=device)
    return _Options(
        strict=options["strict"],
        fix=options["fix"],
        overrides=options["overrides"],
        situation=situation,
        card=card,
    )


def _findings_of_file(name: str, request: _Options) -> Iterator[Finding]:
    if request.fix:
        _apply_fixes(name, request)
    document = load_document(name, request.overrides)
    outcome = validate_document(document, request.situation)
    findings = outcome.findings
    if request.card is not None:
        findings += tuple(_interval_findings(document, outcome, request))
    for finding in findings:
        yield finding.as_error() if request.strict else finding


def _apply_fixes(name: str, request: _Options) -> None:
    from pathlib import Path  # noqa: PLC0415 - only with --fix

    from toolkit.base.paths import rewrite_file  # noqa: PLC0415
    from toolkit.cli.exit_codes import report_write_errors  # noqa: PLC0415
    from toolkit.config.fix import fix_source  # noqa: PLC0415
    from toolkit.config.text_reader import UnreadableText, read_source  # noqa: PLC0415

    if name == "-":
        raise InputError("--fix cannot rewrite standard input", fix="give the path of the run file")
    try:
        source = read_source(name)
    except UnreadableText:
        return  # validation reports why the file cannot be read
    repair = fix_source(source, request.overrides, request.situation)
    if repair.source.text != source.text:
        with report_write_errors(Path(name)):
            rewrite_file(Path(name), repair.source.bom + repair.source.text)
        for line in applied_edit_lines(name, repair):
            click.echo(line, err=True)
    for line in unfixed_finding_lines(repair):
        click.echo(line, err=True)


def _interval_findings(
    document: Document, outcome: Validation, request: _Options
) -> Iterator[Finding]:
    """Yield a LOAD008 finding if gpu_memory_utilization in the run file is outside the interval
    that the sizer computes for the card that ``--gpu`` names.
    """
    node = document.find_node(("model", "gpu_memory_utilization"))
    if outcome.config is None or node is None or not isinstance(node.value, float):
        return
    from toolkit.base.errors import ToolkitError  # noqa: PLC0415
    from toolkit.config.finding import Fix  # noqa: PLC0415
    from toolkit.sizing import Device, read_spec, solve  # noqa: PLC0415 - only for --gpu

    assert request.card is not None
    model = outcome.config.model
    auto_config = replace(outcome.config, model=replace(model, gpu_memory_utilization="auto"))
    try:
        spec = read_spec(model.model_name, model.revision)
        sizing_result = solve(
            auto_config,
            spec,
            Device.from_card(request.card),
            world_size=request.situation.world_size,
        )
    except ToolkitError:
        # The model is missing (MODEL001) or the run does not fit. envcheck size reports either.
        return
    low, high = sizing_result.interval.min, sizing_result.interval.max
    if low is None or high is None or low <= node.value <= high:
        return
    yield Finding(
        rule="LOAD008",
        severity=Severity.ERROR,
        message=f"model.gpu_memory_utilization: {node.value} is outside the possible interval, "
        f"which is {low:.3f} to {high:.3f}",
        path=("model", "gpu_memory_utilization"),
        source=node.source,
        position=node.position,
        notes=(
            f"the sizer computed this interval for {request.card.name}; `envcheck size --gpu` "
            "shows the whole memory budget",
        ),
        fixes=(Fix("gpu_memory_utilization: auto"),),
    )


def expand_arguments(arguments: tuple[str, ...]) -> Iterator[str]:
    """Yield the run files that the arguments describe. An argument is a file, a folder, a glob
    pattern, or "-". The files of a folder or a pattern are sorted.

    Raises InputError for a folder or a pattern without run files.
    """
    for argument in arguments:
        if argument == "-":
            yield argument
        elif os.path.isdir(argument):
            paths = sorted(_run_files_in(argument))
            if not paths:
                raise InputError(
                    "contains no run file",
                    where=argument,
                    fix="use a folder with `*.yaml`, `*.toml` or `*.json` run files",
                )
            yield from paths
        elif not os.path.lexists(argument) and any(mark in argument for mark in "*?["):
            import glob  # noqa: PLC0415 - rarely needed: most shells expand patterns

            paths = sorted(glob.glob(argument, recursive=True))
            if not paths:
                raise InputError("matches no file", where=argument)
            for one in paths:
                if not os.path.isdir(one):
                    yield one
        else:
            yield argument


def _run_files_in(folder: str) -> Iterator[str]:
    """Yield the run files in a folder and its subfolders: all YAML and TOML files, and the JSON
    files that have a section ``model``. Other JSON files are not run files.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".")]
        for file in files:
            path, suffix = os.path.join(parent, file), os.path.splitext(file)[1].lower()
            if suffix in (".yaml", ".yml", ".toml") or (
                suffix == ".json" and "model" in load_document(path).root.value
            ):
                yield path

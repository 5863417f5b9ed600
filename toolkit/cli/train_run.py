"""``toolkit train``: a run file, from pre-flight to report."""

from __future__ import annotations

import json
import os
import sys

import click


@click.command("train")
@click.argument("run_file", metavar="RUN.yaml")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the run file."
)
@click.option("--output-dir", metavar="DIR", help="Instead of runtime.output_dir.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Instead of grpo.max_steps.")
@click.option("--resume", metavar="auto|must|never|DIR", help="Instead of runtime.resume.")
@click.option("--evaluate", is_flag=True, help="Judge held-out prompts, greedy, before and after.")
@click.option("--dry-run", is_flag=True, help="Show the resolved run as JSON and stop.")
@click.option("--debug", is_flag=True, help="Show tracebacks and what upstream libraries say.")
def train(  # noqa: PLR0913 - one parameter an option
    run_file: str,
    overrides: tuple[str, ...],
    output_dir: str | None,
    max_steps: int | None,
    resume: str | None,
    evaluate: bool,
    dry_run: bool,
    debug: bool,
) -> None:
    """Train RUN.yaml with GRPO: check the node, size, train, report.

    Exit codes: 1 change the run file, 2 unreadable input, 3 bad node, 4 try later, 75 stopped by a
    signal with a checkpoint (start the same command again).
    """
    given = {
        "runtime.output_dir": output_dir,
        "grpo.max_steps": max_steps,
        "runtime.resume": resume,
    }
    named = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    debug = debug or "--debug" in sys.argv or os.environ.get("TOOLKIT_DEBUG", "") == "1"
    start(run_file, [*overrides, *named], evaluate=evaluate, dry_run=dry_run, debug=debug)


def start(
    run_file: str, overrides: list[str], *, evaluate: bool, dry_run: bool, debug: bool
) -> None:
    """Load and validate the run file, then show it or run it."""
    from toolkit.config import load_run  # noqa: PLC0415 - heavy floors are imported when they are run
    from toolkit.train.quiet import prepare_environment  # noqa: PLC0415

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = load_run(run_file, overrides, world_size=world_size)
    if dry_run:
        from toolkit.train.folder import as_mapping  # noqa: PLC0415
        from toolkit.train.preflight import preflight  # noqa: PLC0415

        ready = preflight(config, world_size=world_size, judge=False)
        click.echo(json.dumps(as_mapping(ready.config), indent=2))
        return
    prepare_environment()
    from toolkit.train.parts import Options  # noqa: PLC0415 - imports torch
    from toolkit.train.run import run  # noqa: PLC0415

    run(config, Options(evaluate=evaluate, debug=debug))

"""``toolkit demo``: create a small model and data, then check, size, validate and train with
them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import click

from toolkit.base.errors import ConfigError, DefectError
from toolkit.cli.exit_codes import debug_requested

if TYPE_CHECKING:
    from collections.abc import Sequence

REWARD = "exact_match"


@click.command("demo")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="The engine that generates the completions.",
)
@click.option(
    "--out",
    metavar="DIR",
    help="Folder for all files. The default is the first of runs/demo, runs/demo-2, ... that does "
    "not exist yet.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--debug", is_flag=True, help="Show tracebacks and the output of upstream libraries.")
def demo(engine: str, out: str | None, seed: int, debug: bool) -> None:
    """Pretrain a small model on half of the addition problems, then train it with GRPO on the rest.

    The command creates a character-level Llama model, data and a run file. Then it runs `envcheck
    check`, `envcheck size`, `envcheck validate` and `toolkit train` on them. 500 held-out problems
    are evaluated before and after training.
    """
    begin = monotonic()
    folder = choose_folder(out)
    from toolkit.train.logging_setup import prepare_environment  # noqa: PLC0415 - must run before torch is imported

    # More threads do not make such a small model faster. If other processes use the cores, more
    # threads make the demo minutes slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare_environment()
    from toolkit.train.demo import build_demo  # noqa: PLC0415 - imports torch

    click.echo(f"demo in {folder}")
    try:
        world = build_demo(folder, engine=engine, seed=seed, print_line=click.echo)
    except OSError as problem:
        raise ConfigError(
            f"cannot be written: {problem.strerror}", where=str(folder), fix="choose another --out"
        ) from problem
    click.echo(f"model, data and run file written in {world.pretraining_s:.0f} s")
    run_file = str(world.run_file)
    run_command("envcheck", ["check", "--config", run_file])
    run_command("envcheck", ["size", run_file])
    run_command("envcheck", ["validate", run_file])
    shown = ["--debug"] if debug or debug_requested() else []
    run_command("toolkit", ["train", run_file, "--evaluate", *shown])
    print_results(folder, seconds=monotonic() - begin)


def choose_folder(out: str | None) -> Path:
    """Return the folder that ``--out`` names. Without ``--out``, return the first of runs/demo,
    runs/demo-2, ... that does not exist yet.

    Raises ConfigError if the folder that ``--out`` names is not empty.
    """
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                "is not an empty folder", where=out, fix="choose a folder that does not exist yet"
            )
        return folder
    number = 1
    while (folder := Path("runs", "demo" if number == 1 else f"demo-{number}")).exists():
        number += 1
    return folder


def run_command(program: str, arguments: Sequence[str]) -> None:
    """Print a command and run it in this process. If the command fails, exit with the exit code of
    the command.
    """
    from toolkit.cli import envcheck, train  # noqa: PLC0415 - after parsing

    click.echo(f"\n$ {program} {' '.join(arguments)}")
    group = envcheck.cli if program == "envcheck" else train.cli
    try:
        code = group.main(list(arguments), prog_name=program, standalone_mode=False)
    except SystemExit as exit_request:
        code = exit_request.code
    if code not in (None, 0):
        sys.exit(code)


def print_results(folder: Path, *, seconds: float) -> None:
    """Print where the results are. The last line shows the accuracy before and after training.

    Raises DefectError if the two evaluations used different numbers of problems.
    """
    result = json.loads((folder / "run" / "evaluation.json").read_text())
    before, after = result["before"], result["after"]
    run_file, run = folder / "run.yaml", folder / "run"
    if after["count"] != before["count"]:
        raise DefectError(
            "the evaluations before and after training used different numbers of problems"
        )
    click.echo(
        f"\nmodel     {folder / 'model'}\n"
        f"data      {folder / 'train.jsonl'}, {folder / 'eval.jsonl'}\n"
        f"run file  {run_file}\n"
        f"run       {run} (adapter/, report.html, metrics.jsonl, ...)\n"
        f'try       toolkit generate {run} "37+45="\n'
        f"exact match {before['rewards'][REWARD]:.2f} -> {after['rewards'][REWARD]:.2f}"
        f" on {after['count']} held-out problems, {seconds:.0f} s"
    )

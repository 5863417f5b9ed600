"""``toolkit train``: check the node, train as the run file says, and write a report."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.base import process_environment
from toolkit.base.errors import ToolkitError
from toolkit.base.garbage_collection import collector_paused
from toolkit.cli.exit_codes import debug_requested

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.config.resolved import Situation
    from toolkit.config.run_config import RunConfig

OTHER_RANKS_DELAY_S = 5.0


class ProcessCount(click.IntRange):
    """The type of an option whose value is a number of processes or ``auto``.

    ``auto`` means one process per visible GPU, or one process if there is no GPU.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of processes. Raises click.UsageError if the value is invalid."""
        if value != "auto":
            return int(super().convert(value, param, ctx))
        from toolkit.gpu import devices  # noqa: PLC0415 - only this function needs it
        from toolkit.gpu.snapshot import take_snapshot  # noqa: PLC0415

        return max(1, len(devices.visible_devices(take_snapshot()).devices))


@click.command("train")
@click.argument("run_file", metavar="RUN.yaml")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the run file. Repeatable.",
)
@click.option("--output-dir", metavar="DIR", help="Override runtime.output_dir.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Override grpo.max_steps.")
@click.option("--resume", metavar="auto|must|never|DIR", help="Override runtime.resume.")
@click.option(
    "--evaluate/--no-evaluate",
    default=None,
    help="Evaluate held-out prompts with greedy decoding before and after training. By default, "
    "this happens if there are held-out prompts and grpo.eval_strategy is not set.",
)
@click.option(
    "--nproc-per-node",
    "processes",
    type=ProcessCount(min=1),
    metavar="N|auto",
    help="Train with N processes on this node, one per GPU. With auto, use all visible GPUs. For "
    "several nodes, start this command on each node and set the environment variables PET_NNODES, "
    "PET_NODE_RANK, MASTER_ADDR and MASTER_PORT.",
)
@click.option("--dry-run", is_flag=True, help="Show the resolved run as JSON and stop.")
@click.option("--debug", is_flag=True, help="Show tracebacks and the output of upstream libraries.")
def train(  # noqa: PLR0913 - one parameter per option
    run_file: str,
    overrides: tuple[str, ...],
    output_dir: str | None,
    max_steps: int | None,
    resume: str | None,
    evaluate: bool | None,
    processes: int | None,
    dry_run: bool,
    debug: bool,
) -> None:
    """Train RUN.yaml with GRPO.

    The command checks the node, replaces every "auto" by a value that fits the memory of the GPU,
    trains, and writes a report. Exit codes: 1 the run file must change; 2 an input cannot be read;
    3 the node is bad; 4 try again later; 75 a signal stopped the run after it wrote a checkpoint.
    After exit code 75, start the same command again to continue.
    """
    option_values = {
        "runtime.output_dir": output_dir,
        "grpo.max_steps": max_steps,
        "runtime.resume": resume,
    }
    option_overrides = [
        f"{key}={json.dumps(value)}" for key, value in option_values.items() if value is not None
    ]
    debug = debug or debug_requested()
    if processes is not None and "RANK" in os.environ:
        raise click.UsageError(
            "--nproc-per-node cannot be used inside torchrun or srun, "
            "which start the processes themselves"
        )
    if processes is None:
        world_size = process_environment.world_size()
    else:
        world_size = processes * process_environment.node_count()
    config, rules = _load_run(run_file, [*overrides, *option_overrides], world_size)
    if dry_run:
        _print_resolved_run(config, world_size)
    elif processes is None or world_size == 1:
        _train(config, rules, evaluate=evaluate, debug=debug)
    else:
        sys.exit(_launch(run_file, [*overrides, *option_overrides], processes, evaluate, debug))


def _launch(
    run_file: str, overrides: list[str], processes: int, evaluate: bool | None, debug: bool
) -> int:
    from toolkit.train.launch import launch  # noqa: PLC0415 - only this function needs it

    set_options = [part for text in overrides for part in ("--set", text)]
    evaluate_flags = {None: [], True: ["--evaluate"], False: ["--no-evaluate"]}[evaluate]
    flags = [*evaluate_flags, *(["--debug"] if debug else [])]
    return launch(["train", run_file, *set_options, *flags], processes)


def _load_run(
    run_file: str, overrides: list[str], world_size: int
) -> tuple[RunConfig, Callable[[Situation], object]]:
    """Return the run that the run file describes, and a function. The function takes facts about
    the machine (a Situation) and validates the run file again with these facts.
    """
    from toolkit.config.document_loader import load_document  # noqa: PLC0415 - modules with heavy imports are imported when they are used
    from toolkit.config.resolved import Situation  # noqa: PLC0415
    from toolkit.config.validate import validated_config  # noqa: PLC0415

    try:
        document = load_document(run_file, overrides)
        config = validated_config(document, Situation(world_size=world_size))
    except ToolkitError:
        # torchrun ends all processes when the first process ends. Only rank 0 ends at once, so that
        # the error is printed once.
        time.sleep(OTHER_RANKS_DELAY_S if process_environment.rank() else 0.0)
        raise
    return config, lambda here: validated_config(document, here)


def _print_resolved_run(config: RunConfig, world_size: int) -> None:
    from toolkit.train.checkpointing.run_directory import as_mapping  # noqa: PLC0415
    from toolkit.train.preflight import preflight  # noqa: PLC0415

    ready = preflight(config, world_size=world_size, raise_on_failure=False)
    click.echo(json.dumps(as_mapping(ready.config), indent=2))


def _train(
    config: RunConfig, rules: Callable[[Situation], object], *, evaluate: bool | None, debug: bool
) -> None:
    from toolkit.train.logging_setup import prepare_environment  # noqa: PLC0415

    prepare_environment()
    _compile_kernels_ahead(config)
    _read_weights_ahead(config)
    from toolkit.base.defect import set_run_context  # noqa: PLC0415

    with collector_paused():
        from toolkit.train.checkpointing.run_directory import as_mapping  # noqa: PLC0415
        from toolkit.train.run import run  # noqa: PLC0415
        from toolkit.train.run_context import Options  # noqa: PLC0415 - imports torch

    set_run_context(Path(config.runtime.output_dir), lambda: as_mapping(config))
    run(config, Options(evaluate=evaluate, debug=debug, check_rules=rules))


def _compile_kernels_ahead(config: RunConfig) -> None:
    """Start a process that compiles kernels, while the libraries are imported."""
    from toolkit.config.resolved import Situation, resolve_engine  # noqa: PLC0415
    from toolkit.engine import kernel_process  # noqa: PLC0415

    engine = resolve_engine(config.runtime.engine, config.model.fast_inference, Situation())
    if engine != "transformers":
        kernel_process.start()


def _read_weights_ahead(config: RunConfig) -> None:
    """Start to read the model's weights into the page cache, while the libraries are imported.

    Missing files are ignored here. They are reported when the model is loaded.
    """
    from toolkit.base.read_ahead import read_ahead  # noqa: PLC0415
    from toolkit.sizing.fit import available_host_bytes  # noqa: PLC0415
    from toolkit.sizing.model_source import find_model  # noqa: PLC0415

    with suppress(ToolkitError, OSError):
        files = find_model(config.model.model_name, config.model.revision)
        if files.folder is not None:
            read_ahead(files.folder, available_host_bytes())

"""``envcheck size``: print the memory budget of a run, the possible interval of
gpu_memory_utilization, and the value chosen for every "auto".
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig
    from toolkit.sizing import Device, SizingResult


@click.command()
@click.argument("target", metavar="RUN.YAML|MODEL")
@click.option(
    "--gpu",
    metavar="NAME",
    help="Compute the memory for this card (h200, 4090, ...), even if this node does not have it.",
)
@click.option(
    "--gpu-index",
    type=click.IntRange(min=0),
    metavar="N",
    help="Compute the memory for this node's GPU with the CUDA index N.",
)
@click.option(
    "--cpu", is_flag=True, help="Compute the memory for the CPU, even if this node has a GPU."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the run file, for example lora.r=64. If the argument is a model, change "
    "the default of the key. Repeatable.",
)
@click.option(
    "--world-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of processes of the run, one per GPU.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--write", is_flag=True, help='Write the chosen values into the run file in place of "auto".'
)
def size(
    target: str, *, gpu: str | None, gpu_index: int | None, cpu: bool, as_json: bool, **rest: object
) -> None:
    """Compute the memory that a run needs. The argument is a run file or a model (a folder, a
    config.json or a cached hub id).

    The command reads only config.json and the headers of safetensors files. The exit code is 0 if
    the run fits, 1 if it does not fit, 2 if a file cannot be read. If the run does not fit, the
    output lists changes and the memory that each change would free.
    """
    from toolkit.cli.size_report import format_report  # noqa: PLC0415 - after the arguments are parsed
    from toolkit.cli.size_target import read_target  # noqa: PLC0415 - as above
    from toolkit.config.resolved import Situation  # noqa: PLC0415 - as above
    from toolkit.sizing import read_spec, solve  # noqa: PLC0415 - as above
    from toolkit.sizing.device import device_situation  # noqa: PLC0415 - as above

    overrides, world, write = rest["overrides"], rest["world_size"], rest["write"]
    assert isinstance(overrides, tuple)
    assert isinstance(world, int)
    if sum((gpu is not None, gpu_index is not None, cpu)) > 1:
        raise click.UsageError("--gpu, --gpu-index and --cpu are mutually exclusive.")
    device = None if cpu else choose_device(gpu, gpu_index)
    situation = device_situation(device, world) if device else Situation(world_size=world)
    config, document = read_target(target, overrides, situation)
    if write and document is None:
        raise click.UsageError("--write needs a run file.")
    spec = read_spec(config.model.model_name, config.model.revision)
    result = solve(config, spec, device, world_size=world)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        click.echo(format_report(result, config))
    _refuse_misfit(result, config, quiet=not as_json)
    if write and document is not None:
        from toolkit.cli.size_write import write_chosen_values  # noqa: PLC0415 - only with --write

        click.echo(write_chosen_values(document, result.apply(config)), err=as_json)


def choose_device(gpu: str | None, gpu_index: int | None) -> Device | None:
    """Return the device to size a run for: the card that the options name, or the card of this
    node.

    If this node has no usable card, return None, which means the CPU. If this node has a GPU that
    cannot be used, the reason is printed. Raises ConfigError for an unknown card or index.
    """
    from toolkit.base.errors import ConfigError  # noqa: PLC0415 - after the arguments are parsed
    from toolkit.gpu import cards  # noqa: PLC0415 - after the arguments are parsed
    from toolkit.gpu.devices import select_device, visible_devices  # noqa: PLC0415 - as above
    from toolkit.gpu.presence import find_presence  # noqa: PLC0415 - as above
    from toolkit.gpu.snapshot import take_snapshot  # noqa: PLC0415 - as above
    from toolkit.sizing import Device  # noqa: PLC0415 - as above

    if gpu is not None:
        return Device.from_card(cards.find_card(gpu))
    snapshot = take_snapshot()
    gpu_snapshot = select_device(snapshot, gpu_index)
    if gpu_snapshot is not None:
        return Device.from_node(snapshot, gpu_snapshot)
    presence = find_presence(snapshot)
    reason = (
        presence.text
        if not snapshot.gpus
        else visible_devices(snapshot).problem or "CUDA finds no GPU"
    )
    if gpu_index is not None:
        raise ConfigError(
            f"GPU {gpu_index} was requested, but {reason}",
            where="--gpu-index",
            fix=presence.remedy or None,
        )
    if presence.kind != "none":
        click.echo(f"note: {reason}, so the run is sized for the CPU", err=True)
    return None


def _refuse_misfit(result: SizingResult, config: RunConfig, *, quiet: bool) -> None:
    """Exit with 1 if the run does not fit.

    Raises ConfigError if gpu_memory_utilization in the run file is outside the possible interval.
    """
    if not result.feasible:
        if not quiet:
            click.echo(f"error: {result.infeasible_error()}", err=True)
        sys.exit(1)
    if problem := result.utilization_error(config):
        raise problem

"""``envcheck probe``: print the GPUs that NVML reports, as a table, JSON or Prometheus metrics."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.cli.exit_codes import report_write_errors
from toolkit.cli.render import format_table, styled, wrap_text

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot


@click.command()
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object (report.schema.json); with --watch one object per line.",
)
@click.option(
    "--prometheus",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write metrics for node_exporter's textfile collector.",
)
@click.option("--watch", is_flag=True, help="Repeat until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds between two readings with --watch.",
)
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", help="End --watch after N readings."
)
def probe(
    as_json: bool, prometheus: Path | None, watch: bool, interval: float, count: int | None
) -> None:
    """Show this node's GPUs as NVML reports them.

    The exit code is 0 if there is a GPU, else 3. A GPU that no longer responds is marked in its row
    and does not change the exit code. If no GPU can be used, the output says why: no GPU, no
    driver, no permission, or a driver library that does not match the loaded driver.
    """
    from toolkit.gpu.report import NO_GPU_EXIT  # noqa: PLC0415 - after the arguments are parsed
    from toolkit.gpu.snapshot import take_snapshot  # noqa: PLC0415 - as above

    reading_count = 0
    while True:
        snapshot = take_snapshot()
        reading_count += 1
        if watch and sys.stdout.isatty():
            click.clear()
        print_snapshot(snapshot, as_json=as_json, prometheus=prometheus, one_line=watch)
        if not watch or reading_count == count:
            break
        sys.stdout.flush()
        try:
            time.sleep(interval)
        except KeyboardInterrupt:  # Ctrl-C ends a watch
            break
    if not snapshot.gpus:
        sys.exit(NO_GPU_EXIT)


def print_snapshot(
    snapshot: NodeSnapshot, *, as_json: bool, prometheus: Path | None, one_line: bool = False
) -> None:
    """Print one snapshot in the requested format. If ``one_line`` is true, the JSON has no line
    breaks. If ``prometheus`` is a path, also write the metrics to this file.
    """
    from toolkit.base.paths import write_named_file  # noqa: PLC0415 - as above
    from toolkit.gpu.prometheus import format_metrics  # noqa: PLC0415 - as above
    from toolkit.gpu.report import probe_report  # noqa: PLC0415 - as above

    if prometheus is not None:
        with report_write_errors(prometheus):
            write_named_file(prometheus, format_metrics(snapshot))
    if as_json:
        click.echo(json.dumps(probe_report(snapshot), indent=None if one_line else 2))
    else:
        click.echo(format_snapshot(snapshot))


def format_snapshot(snapshot: NodeSnapshot) -> str:
    """Return the table of GPUs, or the reason why no GPU can be used."""
    from toolkit.gpu.checks.driver import newest_cuda  # noqa: PLC0415 - as above
    from toolkit.gpu.devices import visible_devices  # noqa: PLC0415 - as above
    from toolkit.gpu.presence import find_presence  # noqa: PLC0415 - as above

    if not snapshot.gpus:
        presence = find_presence(snapshot)
        first = styled(f"No GPU can be used: {presence.text}.", "red", bold=True)
        return f"{first}\n{wrap_text(presence.remedy, first='  fix: ', indent='       ')}"
    driver = snapshot.driver.version.value
    cuda = newest_cuda(driver) if driver else None
    head = f"driver {driver or 'of unknown version'}"
    head += f", CUDA {cuda}" if cuda else ""
    visible = visible_devices(snapshot)
    cuda_numbers = {(gpu.parent, gpu.index): str(n) for n, gpu in enumerate(visible.devices)}
    rows = []
    for gpu in snapshot.gpus:
        rows.append(_row(snapshot, gpu, cuda_numbers))
        rows += [_row(snapshot, part, cuda_numbers) for part in gpu.slices]
    headers = ("GPU", "CUDA", "name", "used", "total", "util", "temp", "power", "state")
    lines = [head, format_table(headers, rows, right=(3, 4, 5, 6, 7))]
    if visible.problem:
        lines.append(wrap_text(visible.problem, first="note: ", indent="      "))
    return "\n".join(lines)


def _row(
    snapshot: NodeSnapshot, gpu: GpuSnapshot, cuda_numbers: dict[tuple[int | None, int], str]
) -> list[str]:
    from toolkit.base.formatting import format_bytes  # noqa: PLC0415 - as above
    from toolkit.gpu.devices import cuda_memory  # noqa: PLC0415 - as above

    memory = None if gpu.lost else cuda_memory(snapshot, gpu)
    used = format_bytes(memory.total_bytes - memory.free_bytes) if memory else "?"
    power = "" if gpu.power_mw.value is None else f"{gpu.power_mw.value / 1000:.0f} W"
    return [
        str(gpu.index) if gpu.parent is None else f"{gpu.parent}.{gpu.index}",
        cuda_numbers.get((gpu.parent, gpu.index), "-"),
        str(gpu.name.value or "?").removeprefix("NVIDIA "),
        used,
        format_bytes(memory.total_bytes) if memory else "?",
        "" if gpu.utilization_percent.value is None else f"{gpu.utilization_percent.value} %",
        "" if gpu.temperature_c.value is None else f"{gpu.temperature_c.value} C",
        power,
        gpu_state(gpu),
    ]


def gpu_state(gpu: GpuSnapshot) -> str:
    """Return a few words about the worst problem of the card, or ``ok``. ``envcheck check`` prints
    the details.
    """
    from toolkit.gpu.checks.health import FABRIC_NOT_READY  # noqa: PLC0415 - as above
    from toolkit.gpu.checks.speed import THROTTLE_PROBLEMS  # noqa: PLC0415 - as above
    from toolkit.gpu.devices import in_mig_mode  # noqa: PLC0415 - as above

    if gpu.lost:
        return f"lost ({gpu.state.reason})"
    if gpu.parent is not None:
        return "slice"
    rows, fabric, mask = gpu.remapped_rows.value, gpu.fabric.value, gpu.clock_reasons.value or 0
    problems = (
        (bool(rows and rows["failure"]), "row remap failed"),
        (bool(rows and rows["pending"]), "row remap pending"),
        (bool(gpu.ecc_uncorrected.value), "memory errors"),
        (bool(fabric and fabric["state"] in FABRIC_NOT_READY), "fabric not ready"),
        (any(mask & bit for bit in THROTTLE_PROBLEMS), "throttled"),
        (in_mig_mode(gpu), "MIG"),
    )
    return next((text for holds, text in problems if holds), "ok")

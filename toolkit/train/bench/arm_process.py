"""Run the whole speed benchmark: create the checkpoint, compute the floor (a lower bound of the
time of a step), run the arms (the compared programs), and collect their results.
"""

from __future__ import annotations

import json
import multiprocessing
from typing import TYPE_CHECKING, Any

from toolkit.gpu.devices import select_device
from toolkit.gpu.snapshot import take_snapshot
from toolkit.sizing import Device, read_spec
from toolkit.train.bench import bench_plan, compare
from toolkit.train.bench.floor import Card, Work, floor_seconds, measure_card
from toolkit.train.bench.shapes import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from toolkit.sizing.result import ModelPart
    from toolkit.train.bench.arm_settings import Settings


def run_benchmark(
    shape: str,
    settings: Settings,
    arms: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
    *,
    limit_s: float,
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Run the benchmark. Return the report and the rows of the table. After each arm, the report is
    also written to ``folder/bench.json``.

    Other processes create the checkpoint and measure the speed of the GPU, because this process
    must not use device memory while the arms run.
    """
    say(f"creating a random {shape} checkpoint in {settings.model}")
    card = _run_in_new_process(_create_checkpoint_and_measure, shape, settings.model)
    spec, device = read_spec(settings.model), find_device()
    settings = bench_plan.choose_settings(settings, spec, device)
    say(f"ours: {settings.plan_text}")
    floor = floor_seconds(
        _step_work(settings, bench_plan.solve_settings(settings, spec, device).model), card
    )
    report, results = {}, []
    gpu = device is not None
    for results in compare.run_arms(settings, arms, folder, say, limit_s=limit_s, gpu=gpu):
        report = compare.report(settings, results, floor, card.name)
        (folder / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    return report, compare.table(results, floor)


def _create_checkpoint_and_measure(shape: str, model: str) -> Card:
    from pathlib import Path  # noqa: PLC0415 - runs in the other process

    make_checkpoint(shape, Path(model))
    return measure_card()


def _run_in_new_process(function: Callable[..., Card], *arguments: str) -> Card:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def find_device() -> Device | None:
    """Return the GPU as NVML reports it, or None if there is no GPU."""
    snapshot = take_snapshot()
    gpu = select_device(snapshot)
    return None if gpu is None else Device.from_node(snapshot, gpu)


def _step_work(settings: Settings, model: ModelPart) -> Work:
    """Return the sizes from which ``floor`` computes the lower bound of the time of one step. If
    the toolkit splits the model over several cards, the sizes are those of one card.
    """
    return Work(
        parameters=model.parameters // settings.ours_cards,
        weight_bytes=model.weight_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        prompts=settings.prompts,
        sequences=settings.sequences,
        prompt_tokens=settings.prompt_tokens,
        decode_steps=settings.decode_steps,
        mean_completion_tokens=settings.mean_completion_tokens,
    )

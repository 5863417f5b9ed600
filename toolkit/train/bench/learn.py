"""``toolkit bench --learn``: measure how fast each arm (each compared program) learns, on a real
model and problems with answers.

Each arm trains with each seed in its own process. Then one process evaluates all saved adapters.
The numbers are written to ``learn.json``, and the picture of the learning curves to ``learn.svg``.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from toolkit.sizing import read_spec
from toolkit.train.bench import arm_process, bench_plan, compare, learn_picture
from toolkit.train.bench.learn_settings import (
    LABELS,
    Curve,
    LearnResult,
    LearnSettings,
    Runs,
    curves,
    headline,
)
from toolkit.train.bench.real_model import MODEL_NAME, create_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

EVALUATION_LIMIT_S = 7200.0
OURS_FIELDS = ("ours_batch", "ours_tokens", "ours_checkpointing", "ours_sleep", "ours_engine")


def learn(
    settings: LearnSettings, runs: Runs, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train each arm with each seed, evaluate the saved adapters, and write ``learn.json`` and
    ``learn.svg``. Return the report. Results in ``folder`` that were measured with the same
    settings are kept.

    As in the speed benchmark, ``bench_plan.choose_settings`` chooses the settings of the toolkit's
    arm that the user did not set. An optimizer step has the same number of completions in every
    arm, and the micro-batches of the toolkit's arm need no more memory than those of the other
    arms.
    """
    device = arm_process.find_device()
    planned = bench_plan.choose_settings(settings, read_spec(settings.model), device)
    settings = replace(settings, **{name: getattr(planned, name) for name in OURS_FIELDS})
    _discard_outdated(settings, folder)
    for seed in runs.seeds:
        for arm in runs.arms:
            _train_arm(replace(settings, seed=seed), arm, folder, say, runs.limit_s)
    say("evaluating the adapters")
    arguments = [str(folder / "settings.json"), str(folder)]
    problem = compare.run_module(
        "learn_eval", arguments, folder / "evaluation.log", EVALUATION_LIMIT_S
    )
    results = read_results(folder)
    target = runs.target
    report = summary(settings, results, target, "CPU" if device is None else device.name)
    report["evaluation"] = problem or "complete"
    (folder / "learn.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "learn.svg").write_text(
        learn_picture.draw_curves(curves(results, target), target, report["note"])
    )
    return report


def create_model_checkpoint(folder: Path, model_file: Path | None) -> None:
    """Create the checkpoint in another process, because this process must not use device memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_create_in_process, (folder, model_file))
        pool.close()
        pool.join()


def _create_in_process(folder: Path, model_file: Path | None) -> None:
    create_checkpoint(folder, model_file, lambda line: sys.stderr.write(f"{line}\n"))


def read_results(folder: Path) -> list[LearnResult]:
    """Return the results in ``folder``, in the order of arms and seeds."""
    return [LearnResult.read(path) for path in sorted(folder.glob("*-*.json"))]


def summary(
    settings: LearnSettings, results: Sequence[LearnResult], target: float, card: str
) -> dict[str, Any]:
    """Return the report of the benchmark: the headline, the settings, a learning curve for each
    arm, and the result of every run.
    """
    arm_curves = curves(results, target)
    return {
        "headline": headline(arm_curves, target),
        "note": _note(settings, arm_curves, results, card),
        "model": MODEL_NAME,
        "target_accuracy": target,
        "time": "optimizer steps only, without loading, saving adapters and evaluation",
        "settings": asdict(settings),
        "card": card,
        "curves": [asdict(curve) for curve in arm_curves],
        "runs": [asdict(result) for result in results],
    }


def _note(
    settings: LearnSettings, arm_curves: Sequence[Curve], results: Sequence[LearnResult], card: str
) -> str:
    seeds = sorted({seed for curve in arm_curves for seed in curve.seeds})
    bands_note = "; bands: lowest to highest seed" if len(seeds) > 1 else ""
    transformers_arms = [
        LABELS[arm]
        for arm in sorted({result.arm for result in results if result.generation == "transformers"})
    ]
    generation_note = (
        f"; {', '.join(transformers_arms)} generates with transformers here"
        if transformers_arms
        else ""
    )
    count = f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
    return (
        f"{MODEL_NAME}, task {settings.task}, {settings.held_out} held-out problems, {count}"
        f"{bands_note}; {card}{generation_note}"
    )


def _discard_outdated(settings: LearnSettings, folder: Path) -> None:
    """Delete the results in ``folder`` if they were measured with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.is_file() or LearnSettings.read(path) != settings:
        for result in folder.glob("*-*.json"):
            result.unlink()
    settings.write(path)


def _train_arm(
    settings: LearnSettings, arm: str, folder: Path, say: Callable[[str], None], limit_s: float
) -> None:
    """Train one arm with one seed, unless ``folder`` already has the complete result."""
    result = LearnResult(arm, settings.seed)
    result_path = folder / f"{result.name}.json"
    if result_path.is_file():
        earlier = LearnResult.read(result_path)
        if earlier.not_run is None and earlier.points and earlier.points[-1].step == settings.steps:
            say(f"{result.name}: the result of an earlier run is kept")
            return
        result_path.unlink()
    result.not_run = compare.reason_not_to_run(arm, gpu=True)
    if result.not_run is None:
        say(f"{result.name}: running, log in {folder / (result.name + '.log')}")
        settings_path = folder / f"{result.name}.settings"
        settings.write(settings_path)
        arguments = [arm, str(settings_path), str(result_path)]
        problem = compare.run_module("learn_arm", arguments, folder / f"{result.name}.log", limit_s)
        finished = LearnResult.read(result_path) if result_path.is_file() else result
        finished.not_run = finished.not_run or problem
        result = finished
    result.write(result_path)
    say(f"{result.name}: {result.not_run or 'done'}")


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table as rows of text: a header with the arms, then one measurement per row."""
    curves_json, runs = report["curves"], report["runs"]
    arms = sorted({run["arm"] for run in runs}, key=list(LABELS).index)
    by_arm = {curve["arm"]: curve for curve in curves_json}
    rows = [("", *arms)]

    def add_row(title: str, figure: Callable[[dict[str, Any]], str]) -> None:
        rows.append((title, *(figure(by_arm[a]) if a in by_arm else "not run" for a in arms)))

    target = f"{report['target_accuracy']:.0%}"
    add_row("seeds", lambda c: str(len(c["seeds"])))
    add_row("accuracy at the start", lambda c: f"{c['mean'][0]:.1%}")
    add_row("accuracy at the end", lambda c: f"{c['mean'][-1]:.1%}")
    add_row("steps", lambda c: str(c["steps"][-1]))
    add_row("training time, s", lambda c: f"{c['seconds'][-1]:.1f}")
    add_row(f"time to {target}, s", lambda c: _format_or_not_reached(c["to_target_s"], ".1f"))
    add_row(f"steps to {target}", lambda c: _format_or_not_reached(c["to_target_step"], ".0f"))
    load = {
        arm: [run["load_s"] for run in runs if run["arm"] == arm and run["load_s"] is not None]
        for arm in arms
    }
    shown = (f"{sum(load[arm]) / len(load[arm]):.1f}" if load[arm] else "-" for arm in arms)
    rows.append(("load, s", *shown))
    return rows


def _format_or_not_reached(value: float | None, format_spec: str) -> str:
    return "not reached" if value is None else format(value, format_spec)

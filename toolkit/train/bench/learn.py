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
    settings: LearnSettings, wanted: Runs, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train each arm with each seed, evaluate the saved adapters, and write ``learn.json`` and
    ``learn.svg``. Return the report. Results in ``folder`` that were measured with the same
    settings are kept.

    As in the speed benchmark, ``bench_plan.fill`` chooses the settings of the toolkit's arm that
    the user did not set. An optimizer step has the same completions in every arm, and the
    micro-batches of the toolkit's arm need no more memory than those of the other arms.
    """
    device = arm_process.find_device()
    filled = bench_plan.choose_settings(settings, read_spec(settings.model), device)
    settings = replace(settings, **{name: getattr(filled, name) for name in OURS_FIELDS})
    _keep_or_clear(settings, folder)
    for seed in wanted.seeds:
        for arm in wanted.arms:
            _train(replace(settings, seed=seed), arm, folder, say, wanted.limit_s)
    say("evaluating the adapters")
    values = [str(folder / "settings.json"), str(folder)]
    problem = compare.run_module(
        "learn_eval", values, folder / "evaluation.log", EVALUATION_LIMIT_S
    )
    results = read_results(folder)
    target = wanted.target
    report = summary(settings, results, target, "CPU" if device is None else device.name)
    report["evaluation"] = problem or "complete"
    (folder / "learn.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "learn.svg").write_text(
        learn_picture.draw_curves(curves(results, target), target, report["note"])
    )
    return report


def create_model_checkpoint(folder: Path, given: Path | None) -> None:
    """Create the checkpoint in another process, because this process must not use device memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_prepare, (folder, given))
        pool.close()
        pool.join()


def _prepare(folder: Path, given: Path | None) -> None:
    create_checkpoint(folder, given, lambda line: sys.stderr.write(f"{line}\n"))


def read_results(folder: Path) -> list[LearnResult]:
    """Return the results in ``folder``, in the order of arms and seeds."""
    return [LearnResult.read(path) for path in sorted(folder.glob("*-*.json"))]


def summary(
    settings: LearnSettings, results: Sequence[LearnResult], target: float, card: str
) -> dict[str, Any]:
    """Return the report of the benchmark: the headline, the settings, a learning curve for each
    arm, and the result of every run.
    """
    found = curves(results, target)
    return {
        "headline": headline(found, target),
        "note": _note(settings, found, results, card),
        "model": MODEL_NAME,
        "target_accuracy": target,
        "time": "optimizer steps only, without loading, saving adapters and evaluation",
        "settings": asdict(settings),
        "card": card,
        "curves": [asdict(curve) for curve in found],
        "runs": [asdict(result) for result in results],
    }


def _note(
    settings: LearnSettings, found: Sequence[Curve], results: Sequence[LearnResult], card: str
) -> str:
    seeds = sorted({seed for curve in found for seed in curve.seeds})
    bands = "; bands: lowest to highest seed" if len(seeds) > 1 else ""
    own = [
        LABELS[arm]
        for arm in sorted({one.arm for one in results if one.generation == "transformers"})
    ]
    generated = f"; {', '.join(own)} generates with transformers here" if own else ""
    count = f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
    return (
        f"{MODEL_NAME}, task {settings.task}, {settings.held_out} held-out problems, {count}"
        f"{bands}; {card}{generated}"
    )


def _keep_or_clear(settings: LearnSettings, folder: Path) -> None:
    """Delete the results in ``folder`` if they were measured with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.is_file() or LearnSettings.read(path) != settings:
        for result in folder.glob("*-*.json"):
            result.unlink()
    settings.write(path)


def _train(
    settings: LearnSettings, arm: str, folder: Path, say: Callable[[str], None], limit_s: float
) -> None:
    """Train one arm with one seed, unless ``folder`` already has the complete result."""
    empty = LearnResult(arm, settings.seed)
    answer = folder / f"{empty.name}.json"
    if answer.is_file():
        before = LearnResult.read(answer)
        if before.not_run is None and before.points and before.points[-1].step == settings.steps:
            say(f"{empty.name}: the result of an earlier run is kept")
            return
        answer.unlink()
    empty.not_run = compare.reason_not_to_run(arm, gpu=True)
    if empty.not_run is None:
        say(f"{empty.name}: running, log in {folder / (empty.name + '.log')}")
        own = folder / f"{empty.name}.settings"
        settings.write(own)
        values = [arm, str(own), str(answer)]
        problem = compare.run_module("learn_arm", values, folder / f"{empty.name}.log", limit_s)
        result = LearnResult.read(answer) if answer.is_file() else empty
        result.not_run = result.not_run or problem
        empty = result
    empty.write(answer)
    say(f"{empty.name}: {empty.not_run or 'done'}")


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table as rows of text: a header with the arms, then one measurement per row."""
    found, runs = report["curves"], report["runs"]
    arms = sorted({run["arm"] for run in runs}, key=list(LABELS).index)
    by_arm = {curve["arm"]: curve for curve in found}
    rows = [("", *arms)]

    def row(title: str, figure: Callable[[dict[str, Any]], str]) -> None:
        rows.append((title, *(figure(by_arm[a]) if a in by_arm else "not run" for a in arms)))

    target = f"{report['target_accuracy']:.0%}"
    row("seeds", lambda c: str(len(c["seeds"])))
    row("accuracy at the start", lambda c: f"{c['mean'][0]:.1%}")
    row("accuracy at the end", lambda c: f"{c['mean'][-1]:.1%}")
    row("steps", lambda c: str(c["steps"][-1]))
    row("training time, s", lambda c: f"{c['seconds'][-1]:.1f}")
    row(f"time to {target}, s", lambda c: _or_not(c["to_target_s"], ".1f"))
    row(f"steps to {target}", lambda c: _or_not(c["to_target_step"], ".0f"))
    load = {
        arm: [run["load_s"] for run in runs if run["arm"] == arm and run["load_s"] is not None]
        for arm in arms
    }
    shown = (f"{sum(load[arm]) / len(load[arm]):.1f}" if load[arm] else "-" for arm in arms)
    rows.append(("load, s", *shown))
    return rows


def _or_not(value: float | None, form: str) -> str:
    return "not reached" if value is None else format(value, form)

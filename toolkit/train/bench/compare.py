"""Run the arms (the compared programs) one after another, and put their results in one table."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import format_bytes
from toolkit.train.bench.arm_settings import ARMS, Result, Settings, upper_median
from toolkit.train.launch import GRACE_PERIOD_S, POLL_S, child_environment, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


def run_arms(
    settings: Settings,
    arms: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
    *,
    limit_s: float,
    gpu: bool,
) -> Iterator[list[Result]]:
    """Run each arm in its own process, so that an arm does not use memory of an earlier one. The
    output of an arm goes to a log file.

    After each arm, yield the list of all results so far. An arm that takes longer than ``limit_s``
    seconds is stopped, and its measurements until then are kept. If ``folder`` already has results
    of other arms with the same settings, the list begins with these results.
    """
    results = _kept_results(settings, arms, folder)
    settings.write(folder / "settings.json")
    for arm in arms:
        if reason := reason_not_to_run(arm, gpu):
            results.append(Result(arm, not_run=reason))
        else:
            say(f"{arm}: running, log in {folder / (arm + '.log')}")
            cards = settings.ours_cards if arm == "ours" else 1
            results.append(_run_arm(arm, folder, limit_s, cards))
        say(f"{arm}: {results[-1].not_run or 'done'}")
        yield results


def _kept_results(settings: Settings, arms: Sequence[str], folder: Path) -> list[Result]:
    """Return the stored results of the arms that do not run now (``arms`` lists those that run). If
    the stored results were not measured with ``settings``, delete them and return an empty list.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(folder.glob("*.json")) if path.stem in ARMS]
    settings_path = folder / "settings.json"
    if not settings_path.is_file() or Settings.read(settings_path) != settings:
        for path in paths:
            path.unlink()
        return []
    return [Result.read(path) for path in paths if path.stem not in arms]


def reason_not_to_run(arm: str, gpu: bool) -> str | None:
    """Return the reason why ``arm`` cannot run on this machine, or None if it can run."""
    if arm == "unsloth" and importlib.util.find_spec("unsloth") is None:
        return "Unsloth is not installed"
    if arm == "trl" and not gpu:
        # vLLM 0.31's CPU kernels need packed weights, and packed weights cannot be reloaded.
        return (
            "TRL's colocate mode needs a GPU: on a CPU, vLLM packs its weights and cannot reload "
            "them"
        )
    return None


def _run_arm(arm: str, folder: Path, limit_s: float, cards: int) -> Result:
    """Run one arm and return its result. If the arm has several processes (one per card), the first
    process writes the result.
    """
    result_paths = [
        folder / f"{arm}{f'-{number}' if number else ''}.json" for number in range(cards)
    ]
    result_path = result_paths[0]
    result_path.unlink(missing_ok=True)
    arguments = [[arm, str(folder / "settings.json"), str(path)] for path in result_paths]
    log = folder / f"{arm}.log"
    if cards == 1:
        problem = run_module("arms", arguments[0], log, limit_s)
    else:
        problem = _run_processes(arguments, log, limit_s)
    if not result_path.is_file():
        return Result(arm, not_run=problem or ENDED_UNEXPECTEDLY)
    result = Result.read(result_path)
    result.not_run = result.not_run or problem
    return result


ENDED_UNEXPECTEDLY = "the process ended unexpectedly; see its log"


def run_module(name: str, arguments: Sequence[str], log: Path, limit_s: float) -> str | None:
    """Run a module of the benchmark in its own process, with its output in the file ``log``. Return
    None if the module finished, else the reason why it did not finish.
    """
    with log.open("w") as output:
        try:
            process = subprocess.run(
                [sys.executable, "-m", f"toolkit.train.bench.{name}", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {limit_s:.0f} s"
    return ENDED_UNEXPECTEDLY if process.returncode else None


def _run_processes(arguments: Sequence[Sequence[str]], log: Path, limit_s: float) -> str | None:
    """Start the module ``arms`` in several processes that share a model. Each item of ``arguments``
    has the arguments of one process. Return None if all processes finished, else the reason why
    they did not finish.
    """
    port = free_port()
    with log.open("w") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "toolkit.train.bench.arms", *process_arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(number, len(arguments), port),
            )
            for number, process_arguments in enumerate(arguments)
        ]
        try:
            is_done = _wait_until_done(processes, limit_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if not is_done:
        return f"stopped after {limit_s:.0f} s"
    return ENDED_UNEXPECTEDLY if any(process.returncode for process in processes) else None


def _wait_until_done(processes: Sequence[subprocess.Popen[bytes]], limit_s: float) -> bool:
    """Wait for the processes of an arm. Return False if they are not done within ``limit_s``, else
    True.

    If one process fails, the others may wait for it forever. So a failed arm counts as done
    ``GRACE_PERIOD_S`` seconds after its first failure, even if other processes still run.
    """
    deadline, failure_deadline = time.monotonic() + limit_s, None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if failure_deadline is None and any(process.returncode for process in processes):
            failure_deadline = now + GRACE_PERIOD_S
        if now > deadline:
            return False
        if failure_deadline is not None and now > failure_deadline:
            break
        time.sleep(POLL_S)
    return True


def report(
    settings: Settings, results: Sequence[Result], floor: dict[str, float], card: str
) -> dict[str, Any]:
    """Return the benchmark's report as JSON values: the settings, the card, the floor (a lower
    bound of the step time), and for every arm its result and its step time divided by the floor.
    """
    arms = []
    for result in results:
        median = result.median_step_s
        ratio = median / floor["step"] if median else None
        arms.append(result.to_json() | {"step_over_floor": ratio})
    settings_values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {"settings": settings_values, "card": card, "floor_s": floor, "arms": arms}


def table(results: Sequence[Result], floor: dict[str, float]) -> list[tuple[str, ...]]:
    """Return the table as rows of text: a header with the arms, then one measurement per row. A
    cell is ``-`` if the arm does not have the measurement.
    """
    rows: list[tuple[str, ...]] = [("", *(result.arm for result in results))]
    for title, figure in _figures(floor):
        rows.append((title, *(_cell(result, figure) for result in results)))
    return rows


def _cell(result: Result, figure: Callable[[Result], str | None]) -> str:
    missing = "not run" if result.not_run else "-"
    return figure(result) or missing


def _figures(floor: dict[str, float]) -> list[tuple[str, Callable[[Result], str | None]]]:
    return [
        ("load, s", lambda r: _number(r.load_s, 1)),
        ("first step, s", lambda r: _number(r.first_step_s, 2)),
        ("load + first step, s", lambda r: _number(_add(r.load_s, r.first_step_s), 1)),
        ("median step, s", lambda r: _number(r.median_step_s, 2)),
        ("median rollout, s", lambda r: _number(r.median_rollout_s, 2)),
        ("median training, s", lambda r: _number(r.median_training_s, 2)),
        ("step / floor", lambda r: _number(_ratio(r.median_step_s, floor["step"]), 1, "x")),
        ("rollout, tokens/s", lambda r: _number(r.rollout_tokens_s, 0)),
        ("training, tokens/s", lambda r: _number(r.train_tokens_s, 0)),
        ("padding in a padded batch", lambda r: _number(_percent(r.padding_share), 0, " %")),
        ("publish, s", lambda r: _number(upper_median(r.publish_s), 3)),
        ("peak torch memory", lambda r: _bytes(r.peak_torch_bytes)),
        ("peak device memory", lambda r: _bytes(r.peak_device_bytes)),
        ("logp gap mean, nats", lambda r: _number(r.logp_gap_mean, 6)),
        ("logp gap max, nats", lambda r: _number(r.logp_gap_max, 6)),
        ("base tensors changed", _changed_text),
    ]


def _number(value: float | None, digits: int, unit: str = "") -> str | None:
    return None if value is None else f"{value:.{digits}f}{unit}"


def _bytes(value: int | None) -> str | None:
    return None if value is None else format_bytes(value)


def _add(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left + right


def _ratio(value: float | None, floor: float) -> float | None:
    return value / floor if value and floor else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _changed_text(result: Result) -> str | None:
    if result.base_total is None:
        return None
    return f"{result.base_changed} of {result.base_total}"

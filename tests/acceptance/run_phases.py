"""A run that reports its current phase, for tests that interrupt a run in a certain phase.

``report_phases(handle)`` wraps the function of each phase, only in the forked process. A wrapped
function writes one line when it begins and one line when it ends.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import train_world as world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PHASES = (
    "load",
    "evaluation before",
    "rollout",
    "reward",
    "training step",
    "update",
    "rows",
    "evaluation",
    "checkpoint",
    "evaluation after",
    "end",
)


def phase_functions() -> dict[str, tuple[object, str]]:
    """The function of each phase: (the module or class that holds it, its name)."""
    from toolkit.train import run
    from toolkit.train.checkpointing import trainer_state
    from toolkit.train.report import metrics_log
    from toolkit.train.trainer import GRPOTrainer

    return {
        "load": (run, "load_policy"),
        "rollout": (GRPOTrainer, "_generate_single_turn"),
        "reward": (GRPOTrainer, "_calculate_rewards"),
        "training step": (GRPOTrainer, "_compute_loss"),
        "update": (GRPOTrainer, "_get_grad_norm"),
        "rows": (metrics_log.Recorder, "on_log"),
        "evaluation": (GRPOTrainer, "_evaluate"),
        "checkpoint": (trainer_state, "save"),
        "held out": (run, "_evaluate"),
        "end": (run, "write_results"),
    }


def wrap_phase(phase: str, around: Callable[[str, Callable[[], object]], object]) -> None:
    """Replace the function of ``phase`` by ``around(name, call)``, which must return ``call()``."""
    owner, name = phase_functions()[phase]
    original = getattr(owner, name)

    def wrapped(*args: object, **kwargs: object) -> object:
        reported = phase
        if phase == "held out":
            reported = "evaluation after" if kwargs["adapter"] else "evaluation before"
        return around(reported, lambda: original(*args, **kwargs))

    setattr(owner, name, wrapped)


def report_phases(handle: int) -> None:
    """Write ``> phase`` to ``handle`` when a phase begins, and ``< phase`` when it ends."""

    def around(reported: str, call: Callable[[], object]) -> object:
        os.write(handle, f"> {reported}\n".encode())
        try:
            return call()
        finally:
            os.write(handle, f"< {reported}\n".encode())

    for phase in phase_functions():
        wrap_phase(phase, around)


def start_reporting_run(
    run_file: Path, out: Path, *overrides: str
) -> tuple[int, Iterator[tuple[float, str]]]:
    """Fork a run that reports its phases; return its pid, and an iterator over its lines, each as
    (seconds since the start, line).
    """
    reading, writing = os.pipe()
    pid = world.fork_run(
        run_file, out, *overrides, before=lambda: report_phases(writing), evaluate=True
    )
    os.close(writing)
    return pid, _lines(reading, time.monotonic())


def _lines(handle: int, begin: float) -> Iterator[tuple[float, str]]:
    with os.fdopen(handle, "rb", buffering=0) as stream:
        while line := stream.readline():
            yield time.monotonic() - begin, line.decode().rstrip()


def phase_durations(lines: list[tuple[float, str]]) -> dict[str, list[float]]:
    """The seconds of each phase, one value for each time that the phase ran."""
    found: dict[str, list[float]] = {phase: [] for phase in PHASES}
    begun: dict[str, float] = {}
    for at, line in lines:
        mark, phase = line.split(" ", 1)
        if mark == ">":
            begun[phase] = at
        else:
            found[phase].append(at - begun.pop(phase))
    return found


def open_phases(lines: list[str]) -> list[str]:
    """The phases that have begun but not ended, the innermost last.

    If there are none, the only item names the last phase that ended.
    """
    open_: list[str] = []
    for line in lines:
        mark, phase = line.split(" ", 1)
        if mark == ">":
            open_.append(phase)
        else:
            open_.remove(phase)
    return open_ or [f"after {lines[-1][2:]}" if lines else "before load"]

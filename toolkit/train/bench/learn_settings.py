"""The settings of one run of ``bench --learn``, the result of the run, and the summary of several
runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import TYPE_CHECKING, Any

from toolkit.train.bench.arm_settings import ARMS, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LEARN_DEFAULTS: Mapping[str, Any] = {
    "steps": 100,
    "prompts": 16,
    "num_generations": 8,
    "prompt_tokens": 64,
    "completion_tokens": 32,
    "max_seq_length": 256,
    "r": 32,
    "per_device_batch": 128,
    "learning_rate": 2e-4,
}
"""The values of ``bench --learn``, which replace the defaults of ``Settings``.

The other arms compute the whole step (128 completions) as one micro-batch. With micro-batches of 32
completions, TRL's step took 2.5 times as long.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnSettings(Settings):
    """The settings of one arm with one seed. The adapter is saved each time after ``every``
    optimizer steps. Each saved adapter is evaluated later. ``held_out`` is the number of problems
    of ``task`` for this evaluation.
    """

    task: str = "sums"
    every: int = 10
    held_out: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The runs of one benchmark: the arms (``arms``), the seeds with which each arm trains
    (``seeds``), the target accuracy (``target``), and the time limit of a run in seconds
    (``limit_s``). The report has the time in which each arm reaches the target accuracy.
    """

    arms: Sequence[str]
    seeds: Sequence[int]
    target: float
    limit_s: float


@dataclass(slots=True)
class Point:
    """A saved adapter: the optimizer step after which it was saved, the seconds of training until
    then, its file, and its held-out accuracy. The accuracy is None until it is measured after the
    run.
    """

    step: int
    train_s: float
    adapter: str
    accuracy: float | None = None


@dataclass(slots=True)
class LearnResult:
    """The result of one arm with one seed. ``generation`` is the name of the library that samples
    the completions.
    """

    arm: str
    seed: int
    generation: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    load_s: float | None = None
    points: list[Point] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    logp_gap_mean: float | None = None
    logp_gap_max: float | None = None
    not_run: str | None = None

    @property
    def name(self) -> str:
        """The name of the files of this run, without a suffix."""
        return f"{self.arm}-{self.seed}"

    def write(self, path: Path) -> None:
        """Write the result atomically, because the run may be stopped at any time."""
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> LearnResult:
        """Read a result that :meth:`write` wrote."""
        stored = json.loads(path.read_text())
        field_names = {field_info.name for field_info in fields(cls)}
        values = {name: value for name, value in stored.items() if name in field_names}
        return cls(**values | {"points": [Point(**point) for point in stored["points"]]})

    def time_to_reach(self, accuracy: float) -> tuple[float, float] | None:
        """Return the training seconds and the optimizer steps after which the run reaches
        ``accuracy``, or None if the run never reaches it.

        Both values are interpolated between the first evaluation with at least this accuracy and
        the evaluation before it.
        """
        before: tuple[float, float, float] | None = None
        for point in self.points:
            if point.accuracy is None:
                continue
            current = (point.train_s, float(point.step), point.accuracy)
            if point.accuracy >= accuracy:
                if before is None:
                    return current[0], current[1]
                fraction = (accuracy - before[2]) / (current[2] - before[2])
                seconds, steps = (before[i] + fraction * (current[i] - before[i]) for i in (0, 1))
                return seconds, steps
            before = current
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The results of one arm over all its seeds. Each list has one value per evaluation: the step,
    the mean seconds, and the lowest, mean and highest accuracy. ``to_target_s`` and
    ``to_target_step`` are medians over the seeds. They are None if one of the seeds does not reach
    the target.
    """

    arm: str
    seeds: list[int]
    steps: list[int]
    seconds: list[float]
    low: list[float]
    mean: list[float]
    high: list[float]
    to_target_s: float | None
    to_target_step: float | None


def curves(results: Sequence[LearnResult], target: float) -> list[Curve]:
    """Return a learning curve for each arm with at least one evaluated run, in the order of
    ``ARMS``. A curve has only the optimizer steps at which all seeds of the arm were evaluated.
    """
    arm_curves = []
    for arm in ARMS:
        runs = [run for run in results if run.arm == arm and _accuracies(run)]
        if not runs:
            continue
        by_step = [{p.step: p for p in run.points if p.accuracy is not None} for run in runs]
        steps = sorted(set.intersection(*(set(points) for points in by_step)))
        rows = [[points[step] for points in by_step] for step in steps]
        values = [[p.accuracy for p in row if p.accuracy is not None] for row in rows]
        times_to_target = [run.time_to_reach(target) for run in runs]
        known_times = [time for time in times_to_target if time is not None]
        all_reached = len(known_times) == len(runs)
        arm_curves.append(
            Curve(
                arm=arm,
                seeds=[run.seed for run in runs],
                steps=steps,
                seconds=[sum(p.train_s for p in row) / len(row) for row in rows],
                low=[min(row) for row in values],
                mean=[sum(row) / len(row) for row in values],
                high=[max(row) for row in values],
                to_target_s=median(seconds for seconds, _ in known_times) if all_reached else None,
                to_target_step=median(steps for _, steps in known_times) if all_reached else None,
            )
        )
    return arm_curves


def _accuracies(run: LearnResult) -> list[float]:
    return [point.accuracy for point in run.points if point.accuracy is not None]


def headline(arm_curves: Sequence[Curve], target: float) -> str:
    """Return the main result in one sentence: the time in which each arm reaches the accuracy
    ``target``, and the ratio of the toolkit's time to the time of the fastest other arm.
    """
    times = {curve.arm: curve.to_target_s for curve in arm_curves}
    arm_texts = [
        f"{LABELS[arm]} {'not reached' if seconds is None else f'{seconds:,.0f} s'}"
        for arm, seconds in times.items()
    ]
    other_times = [s for arm, s in times.items() if arm != "ours" and s is not None]
    ours, ratio_text = times.get("ours"), ""
    if ours is not None and other_times and min(other_times) > 0:
        ratio_text = f"; toolkit / fastest other arm: {ours / min(other_times):.2f}"
    return f"Time to {target:.0%} accuracy: {', '.join(arm_texts) or 'not measured'}{ratio_text}"


LABELS: Mapping[str, str] = {"ours": "toolkit", "trl": "TRL", "unsloth": "Unsloth"}

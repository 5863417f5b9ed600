"""Send the rows of metrics.jsonl to experiment trackers (W&B, MLflow, ...) while a run trains.

metrics.jsonl is always complete, but a tracker may miss rows. Each tracker has its own thread, so
that a slow or broken tracker never stops or delays the run.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from toolkit.base.secrets import redact_tree
from toolkit.config.trl_names import TRACKERS, is_installed
from toolkit.train.tracking.lane import TrackerThread
from toolkit.train.tracking.start import RunInfo, open_run_info
from toolkit.train.tracking.to_mlflow import MlflowTracker
from toolkit.train.tracking.to_tensorboard import TensorBoardTracker
from toolkit.train.tracking.to_trackio import TrackioTracker
from toolkit.train.tracking.to_upstream import UpstreamTracker
from toolkit.train.tracking.to_wandb import WandbTracker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from toolkit.config.run_config import RunConfig

TRACKER_CLASSES: dict[str, Callable[[RunInfo], Any]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}
"""Trackers that have their own class here and get the metric names of metrics.jsonl. All other
trackers use transformers' callbacks.
"""
TABLES_PER_RUN = 20
"""Approximate number of completion tables of a whole run."""
TABLE_ROWS = 16
FLUSH_S, STOPPED_S = 30.0, 5.0
"""The seconds that a run waits for its trackers: at its normal end, and after a signal stopped
it.
"""


def tracker_names(asked: Any) -> list[str]:
    """Return the names of the trackers that ``asked`` requests. ``asked`` is the value of
    ``grpo.report_to``, in which "all" means all installed trackers.
    """
    names = [asked] if isinstance(asked, str) else list(asked or ())
    if names == ["all"]:
        return [name for name, package in TRACKERS.items() if package and is_installed(package)]
    return [name for name in names if name != "none"]


class Tracking:
    """The trackers of one run. No method raises an exception, and only ``close`` waits for the
    trackers.
    """

    def __init__(
        self, lanes: Sequence[TrackerThread], say: Callable[[str], None], total: int
    ) -> None:
        """``say`` is a function that prints a line on the terminal. ``total`` is the number of
        steps of the whole run.
        """
        self.lanes, self._say = list(lanes), say
        self._every = max(1, total // TABLES_PER_RUN)

    def row(self, row: Mapping[str, Any], timings: Mapping[str, Any] | None) -> None:
        """Send the numbers in ``row``, a row of metrics.jsonl, to the trackers.

        For a training step, ``timings`` is the step's row of timings.jsonl. The numbers in
        ``timings`` are sent too, under names that begin with ``timing/``.
        """
        step = int(row["step"])
        values = {name: value for name, value in row.items() if name != "step"}
        for name, value in (timings or {}).items():
            if name != "step":
                values[f"timing/{name}"] = value
        numbers = {
            name: float(value) for name, value in values.items() if isinstance(value, (int, float))
        }
        for lane in self.lanes:
            lane.put("row", step, numbers)
        self._tell()

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send the first completions of a step to the trackers as a table. For most steps, nothing
        is sent.

        ``rows`` are the rows of completions.jsonl for the step.
        """
        if step != 1 and step % self._every:
            return
        table = [flat_completion(row) for row in rows[:TABLE_ROWS]]
        for lane in self.lanes:
            lane.put("table", step, table)

    def close(self, *, stopped: bool) -> None:
        """Close the trackers. Wait a limited time until they have sent all rows and tables, then
        drop the rest. The time is shorter if a signal stopped the run (``stopped``).
        """
        for lane in self.lanes:
            lane.finish()
        seconds = STOPPED_S if stopped else FLUSH_S
        for lane in self.lanes:
            seconds = lane.wait(seconds)
        self._tell()

    def _tell(self) -> None:
        for lane in self.lanes:
            for line in lane.news():
                self._say(f"tracker {lane.tracker}: {line}")


def flat_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of completions.jsonl as a flat mapping. Each reward is a separate column, and
    chats are JSON texts.
    """
    found = {name: value for name, value in row.items() if name not in ("rewards", "extra")}
    for name, value in (row.get("rewards") or {}).items():
        found[f"reward/{name}"] = value
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
        for name, value in found.items()
    }


def open_tracking(
    config: RunConfig,
    trainer: Any,
    *,
    run_dir: Path,
    step: int | None,
    total: int,
    say: Callable[[str], None],
) -> Tracking | None:
    """Start the trackers that ``grpo.report_to`` names. Return None if it does not name any
    tracker.

    ``step`` is the step of the checkpoint from which the run resumes; None for a new run.
    """
    names = tracker_names(config.grpo.get("report_to"))
    if not names:
        return None
    described = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    start = open_run_info(config, run_dir, redact_tree(described), step=step)
    lanes = []
    for name in names:
        kind = TRACKER_CLASSES.get(name)
        made = partial(UpstreamTracker, name, trainer) if kind is None else partial(kind, start)
        lanes.append(TrackerThread(name, made))
    return Tracking(lanes, say, total)

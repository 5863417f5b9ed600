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
from toolkit.train.tracking.run_info import RunInfo, open_run_info
from toolkit.train.tracking.to_mlflow import MlflowTracker
from toolkit.train.tracking.to_tensorboard import TensorBoardTracker
from toolkit.train.tracking.to_trackio import TrackioTracker
from toolkit.train.tracking.to_upstream import UpstreamTracker
from toolkit.train.tracking.to_wandb import WandbTracker
from toolkit.train.tracking.tracker_thread import TrackerThread

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
CLOSE_LIMIT_S, STOPPED_CLOSE_LIMIT_S = 30.0, 5.0
"""The seconds that a run waits for its trackers: at its normal end, and after a signal stopped
it.
"""


def tracker_names(report_to: Any) -> list[str]:
    """Return the names of the trackers that ``report_to`` requests. ``report_to`` is the value of
    ``grpo.report_to``, in which "all" means all installed trackers.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if names == ["all"]:
        return [name for name, package in TRACKERS.items() if package and is_installed(package)]
    return [name for name in names if name != "none"]


class Tracking:
    """The trackers of one run. No method raises an exception, and only ``close`` waits for the
    trackers.
    """

    def __init__(
        self, threads: Sequence[TrackerThread], print_line: Callable[[str], None], total: int
    ) -> None:
        """``print_line`` is a function that prints a line on the terminal. ``total`` is the number
        of steps of the whole run.
        """
        self.threads, self._print_line = list(threads), print_line
        self._table_interval = max(1, total // TABLES_PER_RUN)

    def log_row(self, row: Mapping[str, Any], timings: Mapping[str, Any] | None) -> None:
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
        for thread in self.threads:
            thread.queue_call("log_row", step, numbers)
        self._print_messages()

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send the first completions of a step to the trackers as a table. For most steps, nothing
        is sent.

        ``rows`` are the rows of completions.jsonl for the step.
        """
        if step != 1 and step % self._table_interval:
            return
        table = [flat_completion(row) for row in rows[:TABLE_ROWS]]
        for thread in self.threads:
            thread.queue_call("log_table", step, table)

    def close(self, *, stopped: bool) -> None:
        """Close the trackers. Wait a limited time until they have sent all rows and tables, then
        drop the rest. The time is shorter if a signal stopped the run (``stopped``).
        """
        for thread in self.threads:
            thread.finish()
        seconds = STOPPED_CLOSE_LIMIT_S if stopped else CLOSE_LIMIT_S
        for thread in self.threads:
            seconds = thread.wait(seconds)
        self._print_messages()

    def _print_messages(self) -> None:
        for thread in self.threads:
            for line in thread.new_messages():
                self._print_line(f"tracker {thread.tracker}: {line}")


def flat_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of completions.jsonl as a flat mapping. Each reward is a separate column, and
    chats are JSON texts.
    """
    columns = {name: value for name, value in row.items() if name not in ("rewards", "extra")}
    for name, value in (row.get("rewards") or {}).items():
        columns[f"reward/{name}"] = value
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
        for name, value in columns.items()
    }


def open_tracking(
    config: RunConfig,
    trainer: Any,
    *,
    run_dir: Path,
    step: int | None,
    total: int,
    print_line: Callable[[str], None],
) -> Tracking | None:
    """Start the trackers that ``grpo.report_to`` names. Return None if it does not name any
    tracker.

    ``step`` is the step of the checkpoint from which the run resumes; None for a new run.
    """
    names = tracker_names(config.grpo.get("report_to"))
    if not names:
        return None
    run_config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    run_info = open_run_info(config, run_dir, redact_tree(run_config), step=step)
    threads = []
    for name in names:
        tracker_class = TRACKER_CLASSES.get(name)
        make_tracker = (
            partial(UpstreamTracker, name, trainer)
            if tracker_class is None
            else partial(tracker_class, run_info)
        )
        threads.append(TrackerThread(name, make_tracker))
    return Tracking(threads, print_line, total)

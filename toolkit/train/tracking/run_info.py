"""The values with which a tracker starts: the names of the project and the run, the config, and
ids.

A resumed run uses the ids of the interrupted run, so that the tracker continues the same run.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from toolkit.base.errors import InputError
from toolkit.base.files import read_json_object
from toolkit.base.paths import write_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from toolkit.config.run_config import RunConfig

TRACKERS_FILE = "trackers.json"
DEFAULT_PROJECT = "huggingface"
"""The project if the run file does not set ``grpo.project`` (the same default as in TRL)."""

TRACKIO_KEYS = ("space_id", "bucket_id", "static_space_id")
"""Keys of ``grpo`` for trackio, without their prefix ``trackio_``. If none is set, trackio's
project is local.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The values with which a tracker starts.

    If a run was interrupted and resumed, it consists of several parts. ``run_id`` is the same for
    all parts. ``step`` is the step of the checkpoint from which this part continues (0 for a new
    run). ``config`` contains no secrets.
    """

    run_dir: Path
    project: str
    name: str
    run_id: str
    config: Mapping[str, Any]
    step: int = 0
    resumed: bool = False
    trackio: Mapping[str, Any] = field(default_factory=dict)
    tracker_ids: dict[str, str] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def save_tracker_id(self, tracker: str, value: str) -> None:
        """Write an id to trackers.json, so that a resumed run can read it. ``value`` is the id that
        the tracker ``tracker`` gave to this run. Raises OSError.
        """
        with self.lock:
            self.tracker_ids[tracker] = value
            _write_ids(self.run_dir, self.run_id, self.tracker_ids)


def open_run_info(
    config: RunConfig, run_dir: Path, run_config: Mapping[str, Any], *, step: int | None
) -> RunInfo:
    """Return the values with which the trackers of a run start. Write the id of the run, and the
    ids that the trackers gave to it, to trackers.json in ``run_dir``.

    A resumed run reads these ids from trackers.json. A new run (``step`` is None) gets a new id,
    and has no ids of trackers yet.
    """
    stored = {} if step is None else _read_ids(run_dir)
    run_id = str(stored.get("run_id") or uuid4().hex[:8])
    tracker_ids = {str(k): str(v) for k, v in stored.items() if k != "run_id"}
    run_info = RunInfo(
        run_dir=run_dir,
        project=str(config.grpo.get("project") or DEFAULT_PROJECT),
        name=str(config.grpo.get("run_name") or run_dir.resolve().name),
        run_id=run_id,
        config=run_config,
        step=step or 0,
        resumed=bool(stored),
        trackio={name: config.grpo.get(f"trackio_{name}") for name in TRACKIO_KEYS},
        tracker_ids=tracker_ids,
    )
    _write_ids(run_dir, run_id, tracker_ids)
    return run_info


def _read_ids(run_dir: Path) -> dict[str, Any]:
    try:
        return read_json_object(run_dir / TRACKERS_FILE)
    except InputError:
        return {}


def _write_ids(run_dir: Path, run_id: str, ids: Mapping[str, str]) -> None:
    write_file(run_dir / TRACKERS_FILE, json.dumps({"run_id": run_id, **ids}, indent=2) + "\n")


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the nested mapping ``config`` as a flat mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flat_config(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat

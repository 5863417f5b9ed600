"""Write the logs of a run: metrics.jsonl, timings.jsonl and completions.jsonl.

metrics.jsonl and completions.jsonl contain only values that the seed determines. Therefore a run
that was killed and resumed writes the same bytes as an uninterrupted run. Values that differ from
run to run (times and memory) are in timings.jsonl.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from toolkit.base.errors import ConfigError
from toolkit.base.paths import FILE_MODE
from toolkit.base.process_memory import peak_resident_bytes
from toolkit.policy.machine_facts import cuda_in_use
from toolkit.train.metric_names import LEADING_METRICS, RENAMED_METRICS, WALL_CLOCK_METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from toolkit.train.report.reward_watch import RewardWatch
    from toolkit.train.tracking import Tracking
    from toolkit.train.trainer_seam import TrainerSeam

LOG_FILES = ("metrics.jsonl", "timings.jsonl", "completions.jsonl")
TOOL_LOG_FILES = ("tool_calls.jsonl", "tool_timings.jsonl")
"""Additional logs of a run with tools or a multi-step environment."""
MAX_MESSAGE_CHARACTERS = 200_000
"""The maximum number of characters of one prompt or completion in completions.jsonl."""
TIMED_PHASES = ("rollout_s", "publish_s", "reward_s")


class Journal:
    """The run's log files. Rows are only appended.

    When a run resumes, each log is first truncated to the length that the checkpoint recorded.
    """

    def __init__(
        self,
        run_dir: Path,
        positions: Mapping[str, int] | None = None,
        *,
        names: Sequence[str] = LOG_FILES,
    ) -> None:
        """Open the logs ``names``. ``positions`` maps the name of a log to the number of bytes to
        keep. A log in ``names`` that is not in ``positions`` is emptied. Raises OSError.
        """
        self._run_dir = run_dir
        self._handles: dict[str, int] = {}
        self._changed_logs: list[str] = []
        self._digests: dict[str, hashlib._Hash] = {}
        self._sizes: dict[str, int] = {}
        for name in names:
            handle = _open_log(run_dir / name)
            keep = (positions or {}).get(name, 0)
            if os.fstat(handle).st_size > keep:
                os.ftruncate(handle, keep)
            self._handles[name] = handle
            with open(handle, "rb", closefd=False) as file:
                self._digests[name] = hashlib.file_digest(file, "sha256")
            self._sizes[name] = os.fstat(handle).st_size

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Append ``row`` to the log ``name`` with one write call. If the process is killed,
        only the last row can be incomplete. Raises OSError.
        """
        # The name of a metric can contain a lone surrogate (from a reward), which UTF-8 cannot
        # encode.
        line = (json.dumps(to_json_value(row), ensure_ascii=False) + "\n").encode(errors="replace")
        written = os.write(self._handles[name], line)
        self._sizes[name] += written
        if written < len(line):  # On a full disk, a second write raises the error.
            self._sizes[name] += os.write(self._handles[name], line[written:])
        self._digests[name].update(line)

    def sync(self) -> None:
        """Sync all written rows to the disk. Raises OSError."""
        for handle in self._handles.values():
            os.fsync(handle)

    def positions(self) -> dict[str, int]:
        """The length of each log in bytes."""
        return {name: os.fstat(handle).st_size for name, handle in self._handles.items()}

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each log. It shows whether two logs of the same length are different."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def changed_logs(self) -> list[str]:
        """The logs that another program changed (deleted, moved, replaced, shortened or
        extended).
        """
        if self._handles:
            handles = self._handles.items()
            self._changed_logs = [
                name for name, handle in handles if not self._is_unchanged(name, handle)
            ]
        return self._changed_logs

    def _is_unchanged(self, name: str, handle: int) -> bool:
        try:
            status = os.fstat(handle)
            has_expected_size = status.st_size == self._sizes[name]
            return has_expected_size and os.path.samestat(status, (self._run_dir / name).stat())
        except OSError:
            return False

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        self.changed_logs()  # stores the result, because a closed file cannot be checked
        while self._handles:
            os.close(self._handles.popitem()[1])


def _open_log(path: Path) -> int:
    """Open a log for appending, and create it if needed. Raises OSError.

    Only a regular file is accepted. A full pipe would block the run. If the path were a link, the
    run would truncate the file that the link points to.

    Raises:
        ConfigError: the path is not a regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, FILE_MODE)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        handle = -1
    if handle >= 0 and stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    if handle >= 0:
        os.close(handle)
    raise ConfigError(
        "the run writes a log to this path, but the path is not a regular file",
        where=str(path),
        fix="remove the link, folder or device at this path, or set another run folder with "
        "--output-dir",
    )


def to_json_value(value: object) -> Any:
    """Convert ``value`` to values that strict JSON allows. NaN and infinite numbers become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return to_json_value(value.item()) if hasattr(value, "item") else str(value)


def metrics_row(step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl for ``logs``, the metrics that the trainer logs.

    The metrics in LEADING_METRICS come first. All other metrics follow, sorted by name. Values that
    depend on the wall clock are left out.
    """
    metrics: dict[str, Any] = {}
    for key, value in logs.items():
        is_evaluation = key.startswith("eval_")
        name = key.removeprefix("eval_")
        if name in WALL_CLOCK_METRICS:
            continue
        name = RENAMED_METRICS.get(name, name)
        metrics[f"eval/{name}" if is_evaluation else name] = value
    metrics["step"] = step
    leading = {name: metrics.pop(name) for name in LEADING_METRICS if name in metrics}
    return leading | {name: metrics[name] for name in sorted(metrics)}


def peak_memory_bytes(trainer: TrainerSeam | None = None) -> int:
    """The peak GPU memory in bytes. Without a GPU, the peak resident memory of this process."""
    peaks = getattr(trainer, "peaks", None)
    if peaks is not None:  # torch's own peak covers only the current phase
        return int(peaks.so_far())
    if cuda_in_use():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers ships no types that strict mode can use
    """The trainer callback that writes the logs of a run, on the first rank.

    After each step and each evaluation, ``on_row`` is called with two rows: the row of
    metrics.jsonl and the row of timings.jsonl. For an evaluation, the second row is None. ``watch``
    gets each row of metrics.jsonl before the row is written. ``tracking`` gets the rows of
    metrics.jsonl, timings.jsonl and completions.jsonl after they are written.
    """

    def __init__(
        self,
        trainer: TrainerSeam,
        journal: Journal,
        on_row: Callable[[dict[str, Any], dict[str, Any] | None], None],
        *,
        completions: bool,
        watch: RewardWatch | None = None,
        tracking: Tracking | None = None,
    ) -> None:
        self.tracking = tracking
        self.watch = watch
        self.trainer, self.journal, self.on_row = trainer, journal, on_row
        self.log_completions = completions
        self.begin_s = self.last_s = monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, so that the time of the first step does not include loading."""
        del args, state, control, kwargs
        self.last_s = monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the log rows of a step or an evaluation. The summary that the trainer logs at the
        end of training is not written.
        """
        del args, control, kwargs
        if "train_runtime" in logs:
            if self.watch is not None and state.global_step >= state.max_steps:
                self.watch.finish()
            return
        row = to_json_value(metrics_row(state.global_step, logs))
        if row.get("skipped"):
            row["loss"] = None  # transformers logs 0 for a NaN loss
        if self.watch is not None:
            self.watch.check_row(row)
        self.journal.write("metrics.jsonl", row)
        timings = None
        if "loss" in logs:
            timings = self._timings(row)
            self.journal.write("timings.jsonl", timings)
            if self.trainer.tool_log is not None:
                self.trainer.tool_log.write(self.journal, row["step"])
            if self.log_completions and "reward" in row:
                self._write_completions(state.global_step)
        self.on_row(row, timings)
        if self.tracking is not None:
            self.tracking.log_row(row, timings)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restart the clock, so that the time of the next step does not include the evaluation."""
        del args, state, control, kwargs
        self.trainer.timers.pop_seconds()
        self.last_s = monotonic()

    def _timings(self, row: Mapping[str, Any]) -> dict[str, Any]:
        now = monotonic()
        step_s, self.last_s = now - self.last_s, now
        phases = dict.fromkeys(TIMED_PHASES, 0.0) | self.trainer.timers.pop_seconds()
        phases["rollout_s"] = max(0.0, phases["rollout_s"] - phases["publish_s"])
        tokens = (row.get("completion_length") or 0.0) * self.trainer.args.generation_batch_size
        tokens += row.get("dynamic_sampling/discarded_tokens") or 0
        return {
            "step": row["step"],
            "time_s": round(now - self.begin_s, 4),
            "step_s": round(step_s, 4),
            "train_s": round(max(0.0, step_s - sum(phases.values())), 4),
            **{name: round(value, 4) for name, value in phases.items()},
            "tokens_per_s": round(tokens / step_s, 1) if step_s > 0 else 0.0,
            "peak_memory_bytes": peak_memory_bytes(self.trainer),
        }

    def _write_completions(self, step: int) -> None:
        logs, weights = self.trainer.completion_log, self.trainer.reward_weights.tolist()
        names = list(logs["rewards"])
        rows = []
        for index, prompt in enumerate(logs["prompt"]):
            rewards = {name: to_json_value(logs["rewards"][name][index]) for name in names}
            weighted_rewards = [
                (w, r) for w, r in zip(weights, rewards.values(), strict=True) if r is not None
            ]
            rows.append(
                {
                    "step": step,
                    "prompt": shorten_message(prompt),
                    "completion": shorten_message(logs["completion"][index]),
                    "reward": sum(w * r for w, r in weighted_rewards) if weighted_rewards else None,
                    "rewards": rewards,
                    "advantage": logs["advantages"][index],
                    **_extra_values(logs, index),
                }
            )
            self.journal.write("completions.jsonl", rows[-1])
        if self.tracking is not None:
            self.tracking.log_completions(step, rows)


def shorten_message(value: object) -> Any:
    """Shorten a prompt or a completion to about ``MAX_MESSAGE_CHARACTERS`` characters.

    ``value`` is a text or the messages of a chat. If a text is too long, its middle is removed.
    """
    return _shorten(value, [MAX_MESSAGE_CHARACTERS])


def _shorten(value: object, remaining: list[int]) -> Any:
    if isinstance(value, str):
        limit, remaining[0] = max(remaining[0], 0), remaining[0] - len(value)
        if len(value) <= limit:
            return value
        half = limit // 2
        removed = len(value) - 2 * half
        return f"{value[:half]}... ({removed} characters left out) ...{value[len(value) - half :]}"
    remaining[0] -= 1
    if isinstance(value, dict):
        return {key: _shorten(item, remaining) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_shorten(item, remaining) for item in value[: max(remaining[0], 0)]]
        return items if len(items) == len(value) else [*items, f"... ({len(value)} items)"]
    return value


def _extra_values(logs: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return ``{"extra": {name: value}}`` with the values that rewards passed to ``log_extra`` for
    the completion at ``index``. Without such values, return an empty mapping.

    ``log_extra`` gets a name and one value per completion. If the number of values is not the
    number of completions, all values of this name are left out.
    """
    count = len(logs["prompt"])
    found = {
        str(name): values[index]
        for name, values in (logs.get("extra") or {}).items()
        if len(values) == count
    }
    return {"extra": found} if found else {}

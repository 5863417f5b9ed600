"""Choose the branch on which a run resumes. A run that resumes from its last checkpoint stays on
its branch. A run that resumes from an older checkpoint gets a new branch. A branch is a sequence of
steps (``branch``).

No file of the old branch is deleted. The later checkpoints, logs and results of the old branch are
moved or copied into the folder ``abandoned-<n>`` of the run folder. To resume from a checkpoint in
this folder, set ``runtime.resume`` to the path of the checkpoint.

First, the files to keep are copied. Second, the new branch is recorded. Third, the later
checkpoints are moved. This order is safe if the process is killed at any point: the same command,
or ``resume: auto``, can then resume.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import InputError
from toolkit.base.files import open_bytes, read_json
from toolkit.base.formatting import plural
from toolkit.base.paths import FOLDER_MODE, sync_folder, write_file
from toolkit.train.checkpointing import branch as branches
from toolkit.train.checkpointing import checkpoint
from toolkit.train.report.metrics_log import LOG_FILES, TOOL_LOG_FILES
from toolkit.train.rewards.error_policy import BAD_REWARDS_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from toolkit.train.checkpointing.branch import Branch

RESULT_NAMES = ("adapter", "model", "evaluation.json", "report.html", BAD_REWARDS_FILE)
"""Files of a run other than its logs. A rollback moves them into ``abandoned-<n>``, because they
belong to the old branch.
"""
RECORD_FILE = "abandoned.json"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RunStart:
    """How a new or resumed run begins: its branch, the number of bytes to keep of each log, and
    messages for the user.
    """

    branch: Branch
    log_positions: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _RecordedLog:
    """A log, as it was when a checkpoint was written. The checkpoint recorded the first
    ``kept_bytes`` bytes of the log. ``source`` is a file that begins with these bytes, or None if
    there is no such file.
    """

    name: str
    kept_bytes: int
    source: Path | None


def begin_branch(
    run_dir: Path,
    checkpoint_dir: Path | None,
    *,
    with_logs: bool = True,
    bad_rewards_bytes: int | None = None,
) -> RunStart:
    """Begin a run in ``run_dir``: choose its branch, and move the files of an abandoned branch.

    The run resumes from ``checkpoint_dir``. If ``checkpoint_dir`` is None, it is a new run. If
    ``with_logs`` is False, the run has no logs, and no log is restored.

    This process may have added rows to bad_rewards.jsonl already. ``bad_rewards_bytes`` is the size
    of that file before the first added row. It is None if this process has added no rows.

    Only the first rank calls this, after all checks that can reject the run. Raises OSError.
    """
    if checkpoint_dir is None:
        said = _abandon_earlier_start(run_dir, bad_rewards_bytes) if with_logs else ()
        branch = branches.Branch()
        branches.record_branch(run_dir, branch)
        return RunStart(branch, notes=said)
    old_branch = branches.current_branch(run_dir)
    branch = _branch_from(run_dir, checkpoint_dir, old_branch)
    left_steps = branches.abandoned_steps(run_dir, old_branch, branch)
    logs = (
        [_find_log(run_dir, checkpoint_dir, name) for name in _log_names(run_dir, checkpoint_dir)]
        if with_logs
        else []
    )
    foreign_logs = [log for log in logs if log.source != run_dir / log.name]
    notes = list[str]()
    if (
        branch != old_branch
        or left_steps
        or any((run_dir / log.name).exists() for log in foreign_logs)
    ):
        abandoned = _move_to_abandoned(
            run_dir, old_branch, checkpoint_dir, logs, left_steps, bad_rewards_bytes
        )
        branches.record_branch(run_dir, branch)
        for step in left_steps:
            checkpoint.move_into(checkpoint.path_of(run_dir, step), abandoned)
        if left_steps:
            moved = ", ".join(f"checkpoint-{step}" for step in sorted(left_steps))
            notes.append(
                f"the checkpoints later than {checkpoint_dir} were moved to {abandoned}: {moved}"
            )
    elif not (run_dir / branches.BRANCH_FILE).exists():
        branches.record_branch(run_dir, branch)
    for log in foreign_logs:
        _restore_log(run_dir / log.name, log)
        if log.source is None and log.kept_bytes:
            notes.append(
                f"{log.name} is not the file that {checkpoint_dir} recorded, so a new log begins"
            )
    return RunStart(
        branch, {log.name: log.kept_bytes if log.source else 0 for log in logs}, tuple(notes)
    )


def _abandon_earlier_start(run_dir: Path, bad_rewards_bytes: int | None) -> tuple[str, ...]:
    """Move the files of an earlier start of the run into ``abandoned-<n>``. Return the messages for
    the user.

    Called if the run folder has no checkpoint. Then the earlier start was stopped before its first
    checkpoint, or a user has removed its checkpoints.
    """
    logs = [_RecordedLog(name, 0, None) for name in _log_names(run_dir, None)]
    old_branch = branches.current_branch(run_dir)
    abandoned = _move_to_abandoned(run_dir, old_branch, None, logs, [], bad_rewards_bytes)
    if not abandoned.exists():
        return ()
    row_count = _count_rows(abandoned / LOG_FILES[0])
    return (
        f"no checkpoint in {run_dir}, which has {plural(row_count, 'row')} of metrics of an earlier"
        f" start: training begins again at step 0, and the earlier files are moved to {abandoned}",
    )


def _log_names(run_dir: Path, checkpoint_dir: Path | None) -> list[str]:
    """Return the names of the run's log files. The logs of tools are included if the run has tools
    now or had tools before.
    """
    positions = {} if checkpoint_dir is None else checkpoint.read_log_positions(checkpoint_dir)[0]
    tool_logs = [name for name in TOOL_LOG_FILES if name in positions or (run_dir / name).exists()]
    return [*LOG_FILES, *tool_logs]


def _count_rows(log: Path) -> int:
    try:
        with open_bytes(log) as handle:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: handle.read(CHUNK_BYTES), b""))
    except InputError:
        return 0


def _branch_from(run_dir: Path, checkpoint_dir: Path, old_branch: Branch) -> Branch:
    """Return the branch ``old_branch`` if ``checkpoint_dir`` is the last checkpoint of this branch.
    Otherwise return a new branch that continues from ``checkpoint_dir``.
    """
    writer, step = branches.read_branch(checkpoint_dir)
    if step is None:
        step = checkpoint.step_in_name(checkpoint_dir.resolve().name) or 0
    is_in_run_dir = checkpoint_dir.resolve().parent == run_dir.resolve()
    later_steps = [other for other in branches.valid_steps(run_dir, old_branch) if other > step]
    if is_in_run_dir and old_branch.contains(writer.name, step) and not later_steps:
        return old_branch
    return writer.fork(step)


def _find_log(run_dir: Path, checkpoint_dir: Path, name: str) -> _RecordedLog:
    """Return the log ``name`` as the checkpoint ``checkpoint_dir`` recorded it.

    Two files can be the ``source`` of the result: first the log in the run folder, then the log
    next to ``checkpoint_dir`` (in an ``abandoned-<n>`` folder, or in another run folder). The first
    of them that begins with the recorded bytes is chosen. If neither does, ``source`` is None.
    """
    positions, digests = checkpoint.read_log_positions(checkpoint_dir)
    kept_bytes = positions.get(name, 0)
    digest = (digests or {}).get(name)
    parent = checkpoint_dir.resolve().parent
    run_log = run_dir / name
    if digest is None:  # written by an earlier release
        is_usable = (
            parent == run_dir.resolve()
            and run_log.is_file()
            and run_log.stat().st_size >= kept_bytes
        )
        return _RecordedLog(name, kept_bytes, run_log if is_usable else None)
    sources = (run_log, parent / name)
    return _RecordedLog(
        name, kept_bytes, next((s for s in sources if prefix_sha256(s, kept_bytes) == digest), None)
    )


def prefix_sha256(file: Path, length: int) -> str | None:
    """Return the SHA-256 of the first ``length`` bytes, or None if the file is shorter or cannot be
    read.
    """
    digest = hashlib.sha256()
    if length == 0:
        return digest.hexdigest()
    try:
        with open_bytes(file) as handle:
            while length and (chunk := handle.read(min(CHUNK_BYTES, length))):
                digest.update(chunk)
                length -= len(chunk)
    except (InputError, OSError):
        return None
    return None if length else digest.hexdigest()


def _move_to_abandoned(
    run_dir: Path,
    old_branch: Branch,
    checkpoint_dir: Path | None,
    logs: list[_RecordedLog],
    left_steps: list[int],
    bad_rewards_bytes: int | None,
) -> Path:
    """Copy the logs and move the results of the abandoned branch into ``abandoned-<n>``, and return
    the path of this folder. If an earlier rollback was killed before it recorded the new branch,
    the folder of the earlier rollback is used again. The folder is not created if there is nothing
    to keep.
    """
    abandoned = checkpoint.next_abandoned_folder(run_dir)
    sizes = {log.name: _size_bytes(run_dir / log.name) for log in logs}
    kept_bytes = {
        log.name: log.kept_bytes if log.source == run_dir / log.name else 0 for log in logs
    }
    loses_rows = any(sizes[name] > length for name, length in kept_bytes.items())
    results = [name for name in RESULT_NAMES if (run_dir / name).exists()]
    if bad_rewards_bytes == 0 and BAD_REWARDS_FILE in results:
        results.remove(BAD_REWARDS_FILE)
    if not (left_steps or loses_rows or results):
        return abandoned
    source = None if checkpoint_dir is None else str(checkpoint_dir.resolve())
    record = {"branch": old_branch.to_json(), "resumed_from": source, "logs": sizes}
    newest = checkpoint.newest_abandoned_folder(run_dir)
    if newest is not None and _read_record(newest) == record:
        abandoned = newest
    else:
        partial = run_dir / f".{abandoned.name}.partial"
        checkpoint.remove_leftover(partial)
        partial.mkdir(mode=FOLDER_MODE)
        for log in logs if loses_rows or left_steps else ():
            if sizes[log.name]:
                shutil.copyfile(run_dir / log.name, partial / log.name)
        write_file(partial / RECORD_FILE, json.dumps(record, indent=1) + "\n", durable=True)
        partial.rename(abandoned)
    for name in results:
        (run_dir / name).rename(abandoned / name)
    if BAD_REWARDS_FILE in results and bad_rewards_bytes is not None:
        _return_new_rows(
            abandoned / BAD_REWARDS_FILE, run_dir / BAD_REWARDS_FILE, bad_rewards_bytes
        )
    sync_folder(abandoned)
    return abandoned


def _return_new_rows(abandoned_file: Path, run_file: Path, old_bytes: int) -> None:
    """Move the bytes after the first ``old_bytes`` bytes of the file ``abandoned_file`` to the file
    ``run_file``. These are the rows that this process has written.
    """
    if _size_bytes(abandoned_file) <= old_bytes:
        return
    with abandoned_file.open("r+b") as file:
        file.seek(old_bytes)
        write_file(run_file, file.read())
        file.truncate(old_bytes)


def _restore_log(run_log: Path, log: _RecordedLog) -> None:
    """Restore the log file ``run_log``. It gets the first ``log.kept_bytes`` bytes of
    ``log.source``, which are the content that the checkpoint recorded. If ``log.source`` is None,
    the recorded content is lost, and ``run_log`` becomes empty.
    """
    if log.source is None:
        if run_log.exists():
            write_file(run_log, b"")
        return
    if log.kept_bytes == 0:
        return
    temporary = run_log.with_name(f".{run_log.name}.partial")
    checkpoint.remove_leftover(temporary)
    with log.source.open("rb") as source, temporary.open("wb") as target:
        remaining = log.kept_bytes
        while remaining and (chunk := source.read(min(CHUNK_BYTES, remaining))):
            target.write(chunk)
            remaining -= len(chunk)
    temporary.replace(run_log)


def _read_record(folder: Path) -> Any:
    try:
        return read_json(folder / RECORD_FILE)
    except InputError:
        return None


def _size_bytes(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0

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
    """How a run resumes: its branch, the number of bytes to keep of each log, and messages for the
    user.
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
    found: Path | None,
    *,
    with_logs: bool = True,
    bad_rewards_bytes: int | None = None,
) -> RunStart:
    """Choose the branch of a run in ``run_dir`` that resumes from ``found`` (None: a new run), and
    move the files of an abandoned branch.

    This process may have added rows to bad_rewards.jsonl already. ``bad_rewards_bytes`` is the size
    of that file before the first added row. It is None if this process has added no rows.

    Only the first rank calls this, after all checks that can reject the run. Raises OSError.
    """
    if found is None:
        said = _restart(run_dir, bad_rewards_bytes) if with_logs else ()
        branch = branches.Branch()
        branches.record_branch(run_dir, branch)
        return RunStart(branch, notes=said)
    before = branches.current_branch(run_dir)
    branch = _branch_from(run_dir, found, before)
    left = branches.abandoned_steps(run_dir, before, branch)
    logs = (
        [_find_log(run_dir, found, name) for name in _log_names(run_dir, found)]
        if with_logs
        else []
    )
    foreign = [log for log in logs if log.source != run_dir / log.name]
    notes = list[str]()
    if branch != before or left or any((run_dir / log.name).exists() for log in foreign):
        aside = _move_to_abandoned(run_dir, before, found, logs, left, bad_rewards_bytes)
        branches.record_branch(run_dir, branch)
        for step in left:
            checkpoint.move_into(checkpoint.path_of(run_dir, step), aside)
        if left:
            moved = ", ".join(f"checkpoint-{step}" for step in sorted(left))
            notes.append(f"the checkpoints later than {found} were moved to {aside}: {moved}")
    elif not (run_dir / branches.BRANCH_FILE).exists():
        branches.record_branch(run_dir, branch)
    for log in foreign:
        _restore_log(run_dir / log.name, log)
        if log.source is None and log.kept_bytes:
            notes.append(f"{log.name} is not the file that {found} recorded, so a new log begins")
    return RunStart(
        branch, {log.name: log.kept_bytes if log.source else 0 for log in logs}, tuple(notes)
    )


def _restart(run_dir: Path, bad_rewards_bytes: int | None) -> tuple[str, ...]:
    """Move the files of an earlier start into ``abandoned-<n>`` if the folder has no checkpoint.
    The earlier start was stopped before its first checkpoint, or a user removed the checkpoints.
    Return the messages for the user.
    """
    logs = [_RecordedLog(name, 0, None) for name in _log_names(run_dir, None)]
    before = branches.current_branch(run_dir)
    aside = _move_to_abandoned(run_dir, before, None, logs, [], bad_rewards_bytes)
    if not aside.exists():
        return ()
    steps = _count_rows(aside / LOG_FILES[0])
    return (
        f"no checkpoint in {run_dir}, which has {plural(steps, 'row')} of metrics of an earlier"
        f" start: training begins again at step 0, and the earlier files are moved to {aside}",
    )


def _log_names(run_dir: Path, found: Path | None) -> list[str]:
    """Return the names of the run's log files. The logs of tools are included if the run has tools
    now or had tools before.
    """
    kept = {} if found is None else checkpoint.read_log_positions(found)[0]
    more = [name for name in TOOL_LOG_FILES if name in kept or (run_dir / name).exists()]
    return [*LOG_FILES, *more]


def _count_rows(log: Path) -> int:
    try:
        with open_bytes(log) as handle:
            return sum(part.count(b"\n") for part in iter(lambda: handle.read(CHUNK_BYTES), b""))
    except InputError:
        return 0


def _branch_from(run_dir: Path, found: Path, before: Branch) -> Branch:
    """Return the branch ``before`` if ``found`` is the last checkpoint of this branch. Otherwise
    return a new branch that continues from ``found``.
    """
    lineage, step = branches.read_branch(found)
    if step is None:
        step = checkpoint.step_in_name(found.resolve().name) or 0
    here = found.resolve().parent == run_dir.resolve()
    later = [one for one in branches.valid_steps(run_dir, before) if one > step]
    if here and before.contains(lineage.name, step) and not later:
        return before
    return lineage.fork(step)


def _find_log(run_dir: Path, found: Path, name: str) -> _RecordedLog:
    """Return the log ``name`` as the checkpoint ``found`` recorded it.

    Two files can be the ``source`` of the result: first the log in the run folder, then the log
    next to ``found`` (in an ``abandoned-<n>`` folder, or in another run folder). The first of them
    that begins with the recorded bytes is chosen. If neither does, ``source`` is None.
    """
    positions, digests = checkpoint.read_log_positions(found)
    keep = positions.get(name, 0)
    digest = (digests or {}).get(name)
    beside = found.resolve().parent
    own = run_dir / name
    if digest is None:  # written by an earlier release
        here = beside == run_dir.resolve() and own.is_file() and own.stat().st_size >= keep
        return _RecordedLog(name, keep, own if here else None)
    sources = (own, beside / name)
    return _RecordedLog(
        name, keep, next((s for s in sources if prefix_sha256(s, keep) == digest), None)
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
            while length and (part := handle.read(min(CHUNK_BYTES, length))):
                digest.update(part)
                length -= len(part)
    except (InputError, OSError):
        return None
    return None if length else digest.hexdigest()


def _move_to_abandoned(
    run_dir: Path,
    before: Branch,
    found: Path | None,
    logs: list[_RecordedLog],
    left: list[int],
    bad_rewards_bytes: int | None,
) -> Path:
    """Copy the logs and move the results of the abandoned branch into ``abandoned-<n>``, and return
    the path of this folder. If an earlier rollback was killed before it recorded the new branch,
    the folder of the earlier rollback is used again. The folder is not created if there is nothing
    to keep.
    """
    aside = checkpoint.next_abandoned_folder(run_dir)
    sizes = {log.name: _size_bytes(run_dir / log.name) for log in logs}
    known = {log.name: log.kept_bytes if log.source == run_dir / log.name else 0 for log in logs}
    cut = any(sizes[name] > length for name, length in known.items())
    results = [name for name in RESULT_NAMES if (run_dir / name).exists()]
    if bad_rewards_bytes == 0 and BAD_REWARDS_FILE in results:
        results.remove(BAD_REWARDS_FILE)
    if not (left or cut or results):
        return aside
    source = None if found is None else str(found.resolve())
    described = {"branch": before.to_json(), "resumed_from": source, "logs": sizes}
    newest = checkpoint.newest_abandoned_folder(run_dir)
    if newest is not None and _read_record(newest) == described:
        aside = newest
    else:
        partial = run_dir / f".{aside.name}.partial"
        checkpoint.remove_leftover(partial)
        partial.mkdir(mode=FOLDER_MODE)
        for log in logs if cut or left else ():
            if sizes[log.name]:
                shutil.copyfile(run_dir / log.name, partial / log.name)
        write_file(partial / RECORD_FILE, json.dumps(described, indent=1) + "\n", durable=True)
        partial.rename(aside)
    for name in results:
        (run_dir / name).rename(aside / name)
    if BAD_REWARDS_FILE in results and bad_rewards_bytes is not None:
        _return_new_rows(aside / BAD_REWARDS_FILE, run_dir / BAD_REWARDS_FILE, bad_rewards_bytes)
    sync_folder(aside)
    return aside


def _return_new_rows(aside: Path, own: Path, length: int) -> None:
    """Move the bytes after the first ``length`` bytes of the file ``aside`` to the file ``own``.
    These are the rows that this process has written.
    """
    if _size_bytes(aside) <= length:
        return
    with aside.open("r+b") as file:
        file.seek(length)
        write_file(own, file.read())
        file.truncate(length)


def _restore_log(own: Path, log: _RecordedLog) -> None:
    """Restore the log file ``own``. It gets the first ``log.kept_bytes`` bytes of ``log.source``,
    which are the content that the checkpoint recorded. If ``log.source`` is None, the recorded
    content is lost, and ``own`` becomes empty.
    """
    if log.source is None:
        if own.exists():
            write_file(own, b"")
        return
    if log.kept_bytes == 0:
        return
    temporary = own.with_name(f".{own.name}.partial")
    checkpoint.remove_leftover(temporary)
    with log.source.open("rb") as source, temporary.open("wb") as target:
        left = log.kept_bytes
        while left and (part := source.read(min(CHUNK_BYTES, left))):
            target.write(part)
            left -= len(part)
    temporary.replace(own)


def _read_record(aside: Path) -> Any:
    try:
        return read_json(aside / RECORD_FILE)
    except InputError:
        return None


def _size_bytes(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0

"""A checkpoint is a folder that is complete or does not exist.

The folder has a temporary name at first. It is renamed after its files are synced and have
checksums. A reader verifies every checksum before it uses the files. All files are JSON or
safetensors, so that loading a checkpoint cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, TypeVar

from toolkit.base import files as regular
from toolkit.base.errors import ConfigError, InputError, first_line
from toolkit.base.formatting import GIB
from toolkit.base.paths import FOLDER_MODE, make_folder, sync_folder, write_file

CHECKSUMS_FILE = "checksums.json"
STATE_FILE = "state.json"
FORMAT_VERSION = 1
MAX_STATE_BYTES = GIB  # trainer_state.json has one row per step
ABANDONED_PREFIX = "abandoned-"
MAX_FAULTS = 20  # at most this many faults of one checkpoint are reported
_CHECKPOINT_NAME = re.compile(r"checkpoint-([1-9][0-9]{0,11})")
_ABANDONED_NAME = re.compile(rf"{ABANDONED_PREFIX}([1-9][0-9]{{0,7}})")
Value = TypeVar("Value")
FolderStamp = tuple[tuple[str, int, int, int, int], ...]
_INTACT: dict[Path, FolderStamp] = {}
"""The checkpoints that this process has found intact, with the state of their files at that
time.
"""


def path_of(run_dir: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return run_dir / f"checkpoint-{step}"


def partial_path_of(run_dir: Path, step: int) -> Path:
    """The temporary path of a checkpoint while it is written. Readers ignore this name."""
    return run_dir / f".checkpoint-{step}.partial"


def begin(run_dir: Path, step: int) -> Path:
    """Create the empty temporary folder for ``checkpoint-<step>``, and return its path. Temporary
    folders that a killed process left are removed.
    """
    make_folder(run_dir)
    for stale in run_dir.glob(".checkpoint-*"):
        remove_leftover(stale)
    partial = partial_path_of(run_dir, step)
    partial.mkdir(mode=FOLDER_MODE)
    return partial


def remove_leftover(path: Path) -> None:
    """Remove the folder, file or link at a temporary path. The target of a link is not removed.
    Raises OSError if a file or a link cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def commit(partial: Path, step: int) -> Path:
    """Write the checksums of the files in the folder ``partial``, sync the files, rename the folder
    to ``checkpoint-<step>``, and return the new path.

    If something is already at that path (a damaged checkpoint, a link, another folder), it is moved
    by ``move_into``, never removed. Raises OSError.
    """
    for file in sorted(partial.iterdir()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    write_file(partial / CHECKSUMS_FILE, _checksums_text(_digests(partial)), durable=True)
    folder = path_of(partial.parent, step)
    if os.path.lexists(folder):
        abandoned = newest_abandoned_folder(partial.parent)
        if abandoned is None or os.path.lexists(abandoned / folder.name):
            abandoned = next_abandoned_folder(partial.parent)
        move_into(folder, abandoned)
    partial.rename(folder)
    sync_folder(folder.parent)
    if (stamp := _folder_stamp(folder)) is not None:
        _INTACT[folder] = stamp
    return folder


def next_abandoned_folder(run_dir: Path) -> Path:
    """Return the path ``abandoned-<n>`` in the run folder, with the next free number. Such a folder
    keeps the files of a branch that the run has left.
    """
    number = _largest_abandoned_number(run_dir) + 1
    # ``_largest_abandoned_number`` ignores a name with more digits than ``_ABANDONED_NAME`` allows.
    while os.path.lexists(run_dir / f"{ABANDONED_PREFIX}{number}"):
        number += 1
    return run_dir / f"{ABANDONED_PREFIX}{number}"


def newest_abandoned_folder(run_dir: Path) -> Path | None:
    """Return the folder ``abandoned-<n>`` with the largest number in the run folder, or None if
    there is no such folder.
    """
    number = _largest_abandoned_number(run_dir)
    return run_dir / f"{ABANDONED_PREFIX}{number}" if number else None


def _largest_abandoned_number(run_dir: Path) -> int:
    matches = (_ABANDONED_NAME.fullmatch(entry.name) for entry in os.scandir(run_dir))
    return max((int(match[1]) for match in matches if match), default=0)


def move_into(path: Path, folder: Path) -> Path:
    """Move ``path`` into ``folder``, and return its new path. ``folder`` is created if needed. Code
    that looks for checkpoints does not look into ``folder``. Raises OSError.
    """
    make_folder(folder)
    return path.rename(folder / path.name)


def remove(folder: Path) -> None:
    """Remove a checkpoint. Its folder is renamed first, so that a reader never finds a checkpoint
    of which some files are removed.
    """
    _INTACT.pop(folder, None)
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old")), ignore_errors=True)


def find_faults(folder: Path) -> list[str]:
    """Return the faults of a checkpoint, one line each. An intact checkpoint has none."""
    try:
        if not os.path.lexists(folder / CHECKSUMS_FILE):
            return [f"{CHECKSUMS_FILE} is missing, so the checkpoint was not completed"]
        text = regular.read_bytes(folder / CHECKSUMS_FILE)
        checksums = json.loads(text)
        files: dict[str, dict[str, Any]] = checksums["files"]
        if checksums["format"] != FORMAT_VERSION:
            return [
                f"{CHECKSUMS_FILE}: the format is {checksums['format']!r}, but this release reads "
                f"{FORMAT_VERSION}"
            ]
        if _checksums_text(files) != text.decode():
            return [f"{CHECKSUMS_FILE} was altered"]
    except InputError as problem:
        return [f"{CHECKSUMS_FILE}: {problem.message}"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        return [f"{CHECKSUMS_FILE} cannot be read: {first_line(problem)}"]
    faults = [
        fault for name, expected in files.items() if (fault := _file_fault(folder, name, expected))
    ]
    hidden = len(faults) - MAX_FAULTS
    return faults if hidden <= 0 else [*faults[:MAX_FAULTS], f"and {hidden} more"]


def _file_fault(folder: Path, name: str, expected: object) -> str | None:
    file = folder / name
    if Path(name).name != name or "\0" in name:
        return f"{name!r} points outside the folder"
    if not isinstance(expected, dict):
        return f"{name} has no checksum"
    if file.is_symlink():
        return f"{name} is a link, but was written as a file"
    if not file.is_file():
        return f"{name} is missing"
    size = file.stat().st_size
    if size != expected.get("bytes"):
        return f"{name} has {size} bytes, but {expected.get('bytes')} were written"
    try:
        return (
            None
            if _sha256(file) == expected.get("sha256")
            else (f"{name} has a different checksum")
        )
    except InputError as problem:
        return f"{name}: {problem.message}"


def is_intact(folder: Path) -> bool:
    """Whether the checkpoint has no faults. If an earlier call found no faults, the files are read
    again only if they changed.
    """
    stamp = _folder_stamp(folder)
    if stamp is not None and _INTACT.get(folder) == stamp:
        return True
    if find_faults(folder):
        return False
    if stamp is not None:
        _INTACT[folder] = stamp
    return True


def _folder_stamp(folder: Path) -> FolderStamp | None:
    """A value that changes when a file of ``folder`` changes."""
    try:
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(folder)]
    except OSError:
        return None
    return tuple(sorted((n, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in stats))


def list_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints in a run folder, intact or damaged, the latest first.

    Links, names that the toolkit does not write (``checkpoint-007``), and folders with neither
    checksums nor state are ignored.
    """
    steps = (step_in_name(entry.name) for entry in _subfolders(run_dir))
    return sorted(
        (s for s in steps if s is not None and _is_toolkit_checkpoint(path_of(run_dir, s))),
        reverse=True,
    )


def step_in_name(name: str) -> int | None:
    """The step in ``checkpoint-<step>``, or None for every other name."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _subfolders(run_dir: Path) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(run_dir) if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_toolkit_checkpoint(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (CHECKSUMS_FILE, STATE_FILE))


def check_replica_count(folder: Path, replicas: int, processes_per_replica: int = 1) -> None:
    """Check that this run has as many replicas as the run that wrote the checkpoint ``folder``.

    A replica is a group of ``processes_per_replica`` processes that share a model. Without tensor
    parallelism, each process is a replica. A checkpoint stores the buffered rollouts and the states
    of the random generators of each replica. ``replicas`` is the number of replicas of this run.

    Raises:
        ConfigError: another number of replicas wrote the checkpoint.
    """
    written_replicas = read_state_value(folder, "world_size", int)
    if written_replicas != replicas:
        singular, plural = (
            ("process", "processes") if processes_per_replica == 1 else ("replica", "replicas")
        )
        raise ConfigError(
            f"the checkpoint was written by {written_replicas} "
            f"{plural if written_replicas > 1 else singular}, but this run has {replicas}",
            where=str(folder),
            fix=f"start {written_replicas * processes_per_replica} processes (on one node: "
            f"--nproc-per-node {written_replicas * processes_per_replica}), or begin another run "
            "with --output-dir",
        )


def tensor_parallel_size_of(folder: Path) -> int:
    """Return the number of processes over which the model was split when ``folder`` was written."""
    state = read_json(folder, STATE_FILE)
    size = state.get("tensor_parallel_size", 1) if isinstance(state, dict) else 1
    return size if isinstance(size, int) else 1


def read_state_value(folder: Path, key: str, kind: type[Value]) -> Value:
    """Return the value of ``key`` in state.json of a checkpoint whose checksums were verified.

    Raises:
        InputError: the value is missing or not of type ``kind``, because another program wrote the
            checkpoint.
    """
    state = read_json(folder, STATE_FILE)
    value = state.get(key) if isinstance(state, dict) else None
    if type(value) is not kind:
        raise InputError(
            f"the file is not the state of a run: {key} is missing, or not of type {kind.__name__}",
            where=str(folder / STATE_FILE),
            fix="resume from another checkpoint, or begin another run with --output-dir",
        )
    return value


def read_log_positions(folder: Path) -> tuple[dict[str, int], dict[str, str] | None]:
    """Return how many bytes of each log a checkpoint recorded, and the SHA-256 of these bytes (None
    in a checkpoint of an earlier release).

    Raises:
        InputError: another program wrote the checkpoint.
    """
    positions = read_state_value(folder, "positions", dict)
    state = read_json(folder, STATE_FILE)
    digests = state.get("log_sha256")
    all_valid = all(type(size) is int and size >= 0 for size in positions.values())
    if all_valid and (digests is None or isinstance(digests, dict)):
        return positions, digests
    raise InputError(
        "the file is not the state of a run: positions or log_sha256 has an impossible value",
        where=str(folder / STATE_FILE),
        fix="resume from another checkpoint, or begin another run with --output-dir",
    )


def read_json(folder: Path, name: str) -> Any:
    """Read a JSON file of a checkpoint whose checksums were verified. NaN is allowed.

    Raises:
        InputError: the file is not a regular file, or not JSON.
    """
    file = folder / name
    try:
        return json.loads(regular.read_bytes(file, limit=MAX_STATE_BYTES))
    except (ValueError, RecursionError) as problem:
        what = f"cannot be read as JSON: {first_line(problem)}"
        raise regular.unusable_file_error(file, what) from problem


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS_FILE)
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}


def _checksums_text(files: dict[str, dict[str, Any]]) -> str:
    return json.dumps({"format": FORMAT_VERSION, "files": files}, indent=1, sort_keys=True) + "\n"


def _sha256(file: Path) -> str:
    with regular.open_bytes(file) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]

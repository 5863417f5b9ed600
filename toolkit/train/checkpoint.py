"""A checkpoint is a folder that is complete or does not exist.

It is written beside its place, synced, given checksums, and renamed; a reader recomputes every
checksum before it believes a byte. JSON and safetensors only, so that loading one runs nobody's
code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, InputError
from toolkit.base.paths import FOLDER_MODE, make_folder, sync_folder, write_file

if TYPE_CHECKING:
    from collections.abc import Iterable

CHECKSUMS = "checksums.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


def place(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, if it does."""
    return run_dir / f"checkpoint-{step}"


def partial_place(run_dir: Path, step: int) -> Path:
    """Where it is written: beside its place, under a name that no reader takes for one."""
    return run_dir / f".checkpoint-{step}.partial"


def begin(run_dir: Path, step: int) -> Path:
    """An empty folder beside the place of ``checkpoint-<step>``; leftovers of a writer that died
    are removed.
    """
    make_folder(run_dir)
    for stale in run_dir.glob(".checkpoint-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = partial_place(run_dir, step)
    partial.mkdir(mode=FOLDER_MODE)
    return partial


def commit(partial: Path, step: int) -> Path:
    """Checksum, sync and rename what lies in ``partial``; return ``checkpoint-<step>``. Raises
    OSError.
    """
    for file in sorted(partial.iterdir()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    write_file(partial / CHECKSUMS, _canonical(_digests(partial)), durable=True)
    final = place(partial.parent, step)
    if final.exists():
        # Only a torn one, or one of a run that was told to start again, can lie here.
        old = _set_aside(final)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(final)
    sync_folder(final.parent)
    return final


def _set_aside(folder: Path) -> Path:
    """Renamed before it is removed: a reader never sees half a folder under a checkpoint's name."""
    return folder.rename(folder.with_name(f".{folder.name}.old"))


def faults(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line a fault; empty for a sound one."""
    try:
        text = (folder / CHECKSUMS).read_bytes()
        listed = json.loads(text)
        files: dict[str, dict[str, Any]] = listed["files"]
        if listed["format"] != FORMAT:
            return [f"{CHECKSUMS}: format {listed['format']!r}, this release reads {FORMAT}"]
        if _canonical(files) != text.decode():
            return [f"{CHECKSUMS}: altered"]
    except FileNotFoundError:
        return [f"{CHECKSUMS} is missing: it was not finished"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return [f"{CHECKSUMS} cannot be read: {problem}"]
    return [fault for name, expected in files.items() if (fault := _fault(folder, name, expected))]


def _fault(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    file = folder / name
    if Path(name).name != name:
        return f"{name!r} leads outside the folder"
    if not file.is_file():
        return f"{name} is missing"
    size = file.stat().st_size
    if size != expected.get("bytes"):
        return f"{name}: {size} bytes, {expected.get('bytes')} were written"
    return None if _sha256(file) == expected.get("sha256") else f"{name}: checksum differs"


def list_steps(run_dir: Path) -> list[int]:
    """The steps of all checkpoints in a run folder, sound or not, the latest first."""
    matches = (_NAME.fullmatch(path.name) for path in run_dir.glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The latest sound checkpoint, or None; and a line for each torn one that was passed over."""
    passed: list[str] = []
    for step in list_steps(run_dir):
        folder = place(run_dir, step)
        found = faults(folder)
        if not found:
            return folder, passed
        passed.append(f"{folder}: {'; '.join(found)}")
    return None, passed


def choose(run_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``runtime.resume`` asks for, and the lines about torn ones passed over.

    Raises:
        ConfigError: ``never`` in a folder that holds a run; ``must`` with nothing to resume from.
        InputError: a path that holds no sound checkpoint.
    """
    if resume in ("auto", "must"):
        found, passed = latest(run_dir)
        if found is None and passed:
            torn = "".join(f"\n  torn: {line}" for line in passed)
            raise ConfigError(
                f"no checkpoint here is sound{torn}",
                where=str(run_dir),
                fix="remove them to start again, or name another runtime.output_dir",
            )
        if found is None and resume == "must":
            raise ConfigError(
                "no checkpoint to resume from, and runtime.resume is must",
                where=str(run_dir),
                fix="check runtime.output_dir, or set runtime.resume: auto to begin a new run",
            )
        return found, passed
    if resume == "never":
        if list_steps(run_dir) or (run_dir / "metrics.jsonl").exists():
            raise ConfigError(
                "the folder holds a run, and runtime.resume is never",
                where=str(run_dir),
                fix="name another runtime.output_dir, or set runtime.resume: auto",
            )
        return None, []
    folder = Path(resume)
    if not folder.is_dir():
        raise InputError(
            "no such checkpoint",
            where=resume,
            fix="runtime.resume is auto, must, never, or a checkpoint folder",
        )
    if found_faults := faults(folder):
        raise InputError(
            f"not a sound checkpoint: {'; '.join(found_faults)}",
            where=resume,
            fix="name another, or use resume: auto",
        )
    return folder, []


def refuse_other_world(folder: Path, processes: int) -> None:
    """A checkpoint holds the state of each process, buffered rollouts and generators among it.

    Raises:
        ConfigError: it was written by more or by fewer than ``processes``.
    """
    then = read_json(folder, STATE)["world_size"]
    if then != processes:
        raise ConfigError(
            f"written by {then} process{'es' if then > 1 else ''}, this run has {processes}",
            where=str(folder),
            fix=f"start as many as then (on one node: --nproc-per-node {then}), or begin another"
            " run with --output-dir",
        )


def rotate(run_dir: Path, keep: Iterable[int], *, keep_last: int) -> None:
    """Remove checkpoints but the ``keep_last`` latest and those of the steps in ``keep``. 0 keeps
    all.
    """
    if keep_last <= 0:
        return
    kept = set(keep)
    for step in list_steps(run_dir)[keep_last:]:
        if step not in kept:
            shutil.rmtree(_set_aside(place(run_dir, step)), ignore_errors=True)


def read_json(folder: Path, name: str) -> Any:
    """A JSON file of a checkpoint that has been checked."""
    return json.loads((folder / name).read_text())


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}


def _canonical(files: dict[str, dict[str, Any]]) -> str:
    return json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n"


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

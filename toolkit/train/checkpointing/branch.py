"""Find the checkpoints of a run folder that belong to the current branch of the run.

A branch is one sequence of steps. A run that resumes from an older checkpoint begins a new branch,
because the later steps in the folder are no longer part of the run. Each checkpoint records the
branch that wrote it and the earlier branches that this branch continues. For each earlier branch,
the checkpoint also records the last step that still belongs to the run. The run folder records the
current branch in ``.branch.json``. A checkpoint is valid if its files are intact, the step in its
name is correct, and it belongs to the current branch. Only valid checkpoints are chosen by
``resume: auto``, scored or removed.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base import files
from toolkit.base.errors import ConfigError, InputError
from toolkit.base.paths import write_file
from toolkit.train.checkpointing import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BRANCH_FILE = ".branch.json"
TRAINER_STATE_FILE = "trainer_state.json"
UNNAMED_BRANCH = ""
"""The name of the branch in checkpoints of earlier releases, which did not record a branch."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A sequence of steps that may continue earlier branches. ``parents`` has the name of each
    earlier branch, and its last step that belongs to this branch.
    """

    name: str = field(default_factory=lambda: secrets.token_hex(8))
    parents: tuple[tuple[str, int], ...] = ()

    def contains(self, name: str, step: int) -> bool:
        """Return True if the checkpoint that the branch ``name`` wrote at ``step`` belongs to this
        branch. All checkpoints that this branch wrote belong to it. The checkpoints of a parent
        belong to this branch up to the step that ``parents`` has for the parent.
        """
        return name == self.name or any(name == n and step <= last for n, last in self.parents)

    def fork(self, step: int) -> Branch:
        """Return a new branch that continues from ``step`` of this branch."""
        return Branch(parents=(*self.parents, (self.name, step)))

    @property
    def all_names(self) -> set[str]:
        """The name of this branch and the names of its parents."""
        return {self.name, *(name for name, _ in self.parents)}

    @property
    def start_step(self) -> int | None:
        """The step of the parent branch after which this branch begins, or None for the first
        branch of a run.
        """
        return self.parents[-1][1] if self.parents else None

    def to_json(self) -> dict[str, Any]:
        """The branch as a JSON object, as checkpoints and ``.branch.json`` store it."""
        return {"name": self.name, "parents": [list(parent) for parent in self.parents]}


def read_branch(folder: Path) -> tuple[Branch, int | None]:
    """Return the branch that wrote an intact checkpoint, and the step that the checkpoint records
    (None if it records no step).
    """
    try:
        state = checkpoint.read_json(folder, checkpoint.STATE_FILE)
        step = checkpoint.read_json(folder, TRAINER_STATE_FILE)["global_step"]
    except (InputError, KeyError, TypeError):
        return Branch(UNNAMED_BRANCH), None
    branch = _parse_branch(state.get("branch")) if isinstance(state, dict) else None
    return branch or Branch(UNNAMED_BRANCH), step if isinstance(step, int) else None


def current_branch(run_dir: Path) -> Branch:
    """Return the branch that the run folder records. If it records none, return the branch of its
    latest intact checkpoint.
    """
    try:
        recorded = _parse_branch(files.read_json(run_dir / BRANCH_FILE))
    except InputError:
        recorded = None
    if recorded is not None:
        return recorded
    intact = (folder for folder, _ in _intact_checkpoints(run_dir))
    latest = next(intact, None)
    return Branch(UNNAMED_BRANCH) if latest is None else read_branch(latest)[0]


def record_branch(run_dir: Path, branch: Branch) -> None:
    """Record ``branch`` as the branch of the run folder, atomically. Raises OSError."""
    write_file(run_dir / BRANCH_FILE, json.dumps(branch.to_json()) + "\n", durable=True)


def valid_steps(run_dir: Path, branch: Branch | None = None) -> list[int]:
    """Return the steps of the valid checkpoints, the latest first."""
    branch = branch or current_branch(run_dir)
    return [
        step
        for folder, step in _intact_checkpoints(run_dir)
        if branch.contains(_branch_name(folder), step)
    ]


def abandoned_steps(run_dir: Path, before: Branch, after: Branch) -> list[int]:
    """Return the steps of the checkpoints that no longer belong to the run when its branch changes
    from ``before`` to ``after``.

    Such a checkpoint was written on one of these two branches, or on a parent of one of them. It
    does not belong to the new branch ``after`` (``Branch.contains``).
    """
    run_branches = before.all_names | after.all_names
    return [
        step
        for folder, step in _intact_checkpoints(run_dir)
        if (name := _branch_name(folder)) in run_branches and not after.contains(name, step)
    ]


def latest_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the latest valid checkpoint (None if there is none), and one line of text for each
    later checkpoint. Each line says why that checkpoint is not valid.
    """
    branch, skipped = current_branch(run_dir), list[str]()
    for step in checkpoint.list_steps(run_dir):
        folder = checkpoint.path_of(run_dir, step)
        if not checkpoint.is_intact(folder):
            skipped.append(f"{folder}: {'; '.join(checkpoint.find_faults(folder))}")
        elif _recorded_step(folder) != step:
            skipped.append(
                f"{folder}: contains step {_recorded_step(folder)}, which is not the step in its "
                "name"
            )
        elif not branch.contains(_branch_name(folder), step):
            skipped.append(f"{folder}: belongs to another branch or another run")
        else:
            return folder, skipped
    return None, skipped


def resume_point(run_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """Return the checkpoint that ``resume`` (``runtime.resume``) selects (None for a new run), and
    one line of text for each checkpoint that was skipped.

    Raises:
        ConfigError: ``resume`` is ``never`` and the folder contains a run. Or ``resume`` is
            ``must`` and there is no checkpoint to resume from. Or the folder has checkpoints, but
            none is valid.
        InputError: ``resume`` is a path, but there is no intact checkpoint at this path.
    """
    if resume in ("auto", "must"):
        found, skipped = latest_checkpoint(run_dir)
        if found is None and skipped:
            raise ConfigError(
                "no checkpoint in this folder is intact and belongs to this run"
                + "".join(f"\n  skipped: {line}" for line in skipped),
                where=str(run_dir),
                fix="remove the checkpoints to start again, set runtime.resume to one of them, or "
                "set another runtime.output_dir",
            )
        if found is None and resume == "must":
            raise ConfigError(
                "runtime.resume is must, but there is no checkpoint to resume from",
                where=str(run_dir),
                fix="check runtime.output_dir, or set runtime.resume: auto to begin a new run",
            )
        return found, skipped
    if resume == "never":
        if checkpoint.list_steps(run_dir) or (run_dir / "metrics.jsonl").exists():
            raise ConfigError(
                "runtime.resume is never, but the folder contains a run",
                where=str(run_dir),
                fix="set another runtime.output_dir, or runtime.resume: auto",
            )
        return None, []
    folder = Path(resume)
    if not folder.is_dir():
        raise InputError(
            "the checkpoint does not exist",
            where=resume,
            fix="set runtime.resume to auto, must, never, or a checkpoint folder",
        )
    if faults := checkpoint.find_faults(folder):
        raise InputError(
            f"the checkpoint is damaged: {'; '.join(faults)}",
            where=resume,
            fix="set runtime.resume to another checkpoint, or to auto",
        )
    return folder, []


def rotate_checkpoints(
    run_dir: Path, keep_steps: Iterable[int], *, keep_last: int, branch: Branch | None = None
) -> None:
    """Remove all valid checkpoints of ``branch`` (default: the current branch) except the latest
    ``keep_last`` checkpoints and the checkpoints of the steps in ``keep_steps``. If ``keep_last``
    is 0, no checkpoint is removed.
    """
    if keep_last <= 0:
        return
    kept = set(keep_steps)
    for step in valid_steps(run_dir, branch)[keep_last:]:
        if step not in kept:
            checkpoint.remove(checkpoint.path_of(run_dir, step))


def _intact_checkpoints(run_dir: Path) -> Iterable[tuple[Path, int]]:
    """Yield (folder, step) of each intact checkpoint, the latest first. A checkpoint is left out if
    the step in its name differs from the step that is recorded in it.
    """
    for step in checkpoint.list_steps(run_dir):
        folder = checkpoint.path_of(run_dir, step)
        if checkpoint.is_intact(folder) and _recorded_step(folder) == step:
            yield folder, step


def _recorded_step(folder: Path) -> int | None:
    step = read_branch(folder)[1]
    return checkpoint.step_in_name(folder.name) if step is None else step


def _branch_name(folder: Path) -> str:
    return read_branch(folder)[0].name


def _parse_branch(value: Mapping[str, Any] | Any) -> Branch | None:
    """Return the branch that a JSON value describes, or None if it is not a branch."""
    try:
        parents = tuple((str(name), int(last)) for name, last in value["parents"])
        return Branch(str(value["name"]), parents)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None

"""Which checkpoints of a run folder belong to the run as it is now.

A run that resumes from an older checkpoint begins another branch: the steps that came after it
before are steps of another run. So each checkpoint records the branch that wrote it, with the
branches that this one came from and the last step of each; the run folder records its branch in
``.branch.json``. A checkpoint counts if it is sound, has the name of its own step, and lies on the
run's branch. Only what counts is chosen, scored or removed.
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

RECORD = ".branch.json"
TRAINER_STATE = "trainer_state.json"
EARLIER = ""
"""The branch of checkpoints of earlier releases, which recorded none."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A line of steps: ``parents`` are the branches before it, each with its last step here."""

    name: str = field(default_factory=lambda: secrets.token_hex(8))
    parents: tuple[tuple[str, int], ...] = ()

    def holds(self, name: str, step: int) -> bool:
        """Whether a checkpoint of ``step`` that branch ``name`` wrote lies on this line."""
        return name == self.name or any(name == n and step <= last for n, last in self.parents)

    def fork(self, step: int) -> Branch:
        """A new branch that goes on from ``step`` of this one."""
        return Branch(parents=(*self.parents, (self.name, step)))

    @property
    def names(self) -> set[str]:
        """Of this branch and all before it."""
        return {self.name, *(name for name, _ in self.parents)}

    @property
    def root(self) -> int | None:
        """The step that the branch goes on from; None for a run's first."""
        return self.parents[-1][1] if self.parents else None

    def to_json(self) -> dict[str, Any]:
        """As checkpoints and ``.branch.json`` record it."""
        return {"name": self.name, "parents": [list(parent) for parent in self.parents]}


def of_checkpoint(folder: Path) -> tuple[Branch, int | None]:
    """The branch that wrote a sound checkpoint, and the step in it (None where it records none)."""
    try:
        state = checkpoint.read_json(folder, checkpoint.STATE)
        step = checkpoint.read_json(folder, TRAINER_STATE)["global_step"]
    except (InputError, KeyError, TypeError):
        return Branch(EARLIER), None
    found = _parsed(state.get("branch")) if isinstance(state, dict) else None
    return found or Branch(EARLIER), step if isinstance(step, int) else None


def current(run_dir: Path) -> Branch:
    """The branch of a run folder: as recorded, else that of its latest sound checkpoint."""
    try:
        recorded = _parsed(files.read_json(run_dir / RECORD))
    except InputError:
        recorded = None
    if recorded is not None:
        return recorded
    sound = (folder for folder, _ in _sound(run_dir))
    latest_one = next(sound, None)
    return Branch(EARLIER) if latest_one is None else of_checkpoint(latest_one)[0]


def record(run_dir: Path, branch: Branch) -> None:
    """Make ``branch`` the one of the run folder, in one step. Raises OSError."""
    write_file(run_dir / RECORD, json.dumps(branch.to_json()) + "\n", durable=True)


def own_steps(run_dir: Path, branch: Branch | None = None) -> list[int]:
    """The steps of the checkpoints that count, the latest first."""
    branch = branch or current(run_dir)
    return [step for folder, step in _sound(run_dir) if branch.holds(_writer(folder), step)]


def left_behind(run_dir: Path, before: Branch, after: Branch) -> list[int]:
    """The steps of checkpoints that ``before``, or a branch that ``after`` came from, wrote beyond
    the point where ``after`` left it.
    """
    known = before.names | after.names
    return [
        step
        for folder, step in _sound(run_dir)
        if (name := _writer(folder)) in known and not after.holds(name, step)
    ]


def latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint that counts, or None; and a line for each later one that does not."""
    branch, passed = current(run_dir), list[str]()
    for step in checkpoint.list_steps(run_dir):
        folder = checkpoint.place(run_dir, step)
        if not checkpoint.is_sound(folder):
            passed.append(f"{folder}: {'; '.join(checkpoint.faults(folder))}")
        elif _step(folder) != step:
            passed.append(f"{folder}: holds step {_step(folder)}")
        elif not branch.holds(_writer(folder), step):
            passed.append(f"{folder}: of another branch, or of another run")
        else:
            return folder, passed
    return None, passed


def choose(run_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``runtime.resume`` asks for, and the lines about those passed over.

    Raises:
        ConfigError: ``never`` in a folder that holds a run; ``must`` with nothing to resume from.
        InputError: a path that holds no sound checkpoint.
    """
    if resume in ("auto", "must"):
        found, passed = latest(run_dir)
        if found is None and passed:
            raise ConfigError(
                "no checkpoint here is sound and of this run"
                + "".join(f"\n  passed over: {line}" for line in passed),
                where=str(run_dir),
                fix="remove them to start again, name one with runtime.resume, or name another"
                " runtime.output_dir",
            )
        if found is None and resume == "must":
            raise ConfigError(
                "no checkpoint to resume from, and runtime.resume is must",
                where=str(run_dir),
                fix="check runtime.output_dir, or set runtime.resume: auto to begin a new run",
            )
        return found, passed
    if resume == "never":
        if checkpoint.list_steps(run_dir) or (run_dir / "metrics.jsonl").exists():
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
    if found_faults := checkpoint.faults(folder):
        raise InputError(
            f"not a sound checkpoint: {'; '.join(found_faults)}",
            where=resume,
            fix="name another, or use resume: auto",
        )
    return folder, []


def rotate(
    run_dir: Path, keep: Iterable[int], *, keep_last: int, branch: Branch | None = None
) -> None:
    """Remove checkpoints that count, but the ``keep_last`` latest and those of the steps in
    ``keep``. 0 keeps all.
    """
    if keep_last <= 0:
        return
    kept = set(keep)
    for step in own_steps(run_dir, branch)[keep_last:]:
        if step not in kept:
            checkpoint.remove(checkpoint.place(run_dir, step))


def _sound(run_dir: Path) -> Iterable[tuple[Path, int]]:
    """Sound checkpoints under the name of their step, the latest first."""
    for step in checkpoint.list_steps(run_dir):
        folder = checkpoint.place(run_dir, step)
        if checkpoint.is_sound(folder) and _step(folder) == step:
            yield folder, step


def _step(folder: Path) -> int | None:
    found = of_checkpoint(folder)[1]
    return checkpoint.step_named(folder.name) if found is None else found


def _writer(folder: Path) -> str:
    return of_checkpoint(folder)[0].name


def _parsed(value: Mapping[str, Any] | Any) -> Branch | None:
    """A branch from JSON; None for what is none."""
    try:
        parents = tuple((str(name), int(last)) for name, last in value["parents"])
        return Branch(str(value["name"]), parents)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None

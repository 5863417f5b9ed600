"""The run folder while a run writes to it: whether it is still the one that the run began in.

A folder that is removed, moved or replaced takes what is written without a word. So the run keeps
it open, and compares at each step.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError
from toolkit.train.checkpointing.branch import own_steps
from toolkit.train.rewards.error_policy import BAD_REWARDS_FILE

if TYPE_CHECKING:
    from types import TracebackType

    from toolkit.train.report.metrics_log import Journal


class RunDirWatch:
    """The folder at ``path``, held open. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal: Journal | None = None
        bad = path / BAD_REWARDS_FILE
        self.bad_rewards_bytes = bad.stat().st_size if bad.is_file() else 0
        """Of the samples that were saved before this process."""
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> RunDirWatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        os.close(self._handle)

    def in_place(self) -> bool:
        """Whether ``path`` still leads to the folder."""
        try:
            return os.path.samestat(os.fstat(self._handle), self.path.stat())
        except OSError:
            return False

    def place(self) -> Path | None:
        """Where the folder lies now; None where it is gone."""
        if self.in_place():
            return self.path
        try:
            found = Path(f"/proc/self/fd/{self._handle}").readlink()
            same = os.path.samestat(os.fstat(self._handle), found.stat())
        except OSError:
            return None
        return found if same else None

    def is_whole(self) -> bool:
        """Whether the folder is in its place, and the logs in it."""
        return self.in_place() and not (self.journal is not None and self.journal.missing())

    def fault(self) -> ConfigError:
        """What happened to the folder, where ``is_whole`` is false, and what is saved."""
        place = self.place()
        steps = own_steps(place) if place is not None else []
        told = f"checkpoint-{steps[0]} is written" if steps else "nothing is saved"
        if self.in_place():
            names = " and ".join(self.journal.missing() if self.journal is not None else [])
            return ConfigError(
                f"{names} was removed, replaced or altered by somebody else during the run: rows"
                f" may be lost; {told}",
                where=str(self.path),
                fix="leave the files of a run alone while it runs; start the same command again: it"
                " goes on from the last checkpoint, and the log begins anew",
            )
        if place is None:
            return ConfigError(
                f"the run folder was removed during the run; {told}",
                where=str(self.path),
                fix="leave the folder of a run alone while it runs, and start the run again",
            )
        what = "was replaced by another" if self.path.exists() else "was moved"
        return ConfigError(
            f"the run folder {what} during the run, and is now {place}; {told}",
            where=str(self.path),
            fix=f"start the same command again with --output-dir {place}, or move the folder back",
        )

"""Detect during a run that its folder was moved, removed or replaced.

Writes into a moved or removed folder succeed silently. So the run keeps the folder open, and checks
at each step that the folder at its path is still the open one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError
from toolkit.train.checkpointing.branch import valid_steps
from toolkit.train.rewards.error_policy import BAD_REWARDS_FILE

if TYPE_CHECKING:
    from types import TracebackType

    from toolkit.train.report.metrics_log import Journal


class RunDirWatch:
    """Keeps the folder at ``path`` open until the ``with`` block ends. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal: Journal | None = None
        bad_rewards = path / BAD_REWARDS_FILE
        self.bad_rewards_bytes = bad_rewards.stat().st_size if bad_rewards.is_file() else 0
        """The size of bad_rewards.jsonl when this process started."""
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

    def is_in_place(self) -> bool:
        """Whether the folder is still at ``path``."""
        try:
            return os.path.samestat(os.fstat(self._handle), self.path.stat())
        except OSError:
            return False

    def current_path(self) -> Path | None:
        """Return the current path of the folder, or None if it was removed."""
        if self.is_in_place():
            return self.path
        try:
            path = Path(f"/proc/self/fd/{self._handle}").readlink()
            is_same = os.path.samestat(os.fstat(self._handle), path.stat())
        except OSError:
            return None
        return path if is_same else None

    def is_unchanged(self) -> bool:
        """Whether the run folder is still at its path, and no other program has removed, replaced
        or changed a log file.
        """
        return self.is_in_place() and not (self.journal is not None and self.journal.changed_logs())

    def change_error(self) -> ConfigError:
        """Return the error for a run whose ``is_unchanged`` is false. Its message says what
        happened to the folder or the logs, and which checkpoint was saved.
        """
        path = self.current_path()
        steps = valid_steps(path) if path is not None else []
        saved = f"checkpoint-{steps[0]} was saved" if steps else "nothing was saved"
        if self.is_in_place():
            names = " and ".join(self.journal.changed_logs() if self.journal is not None else [])
            return ConfigError(
                f"{names} was removed, replaced or changed by another program during the run, so "
                f"rows may be lost; {saved}",
                where=str(self.path),
                fix="run the same command again. The run then resumes from the last checkpoint and "
                "begins a new log. Do not change the files of a run while it runs",
            )
        if path is None:
            return ConfigError(
                f"the run folder was removed during the run; {saved}",
                where=str(self.path),
                fix="start the run again. Do not move or remove its folder while it runs",
            )
        what = "was replaced by another folder" if self.path.exists() else "was moved"
        return ConfigError(
            f"the run folder {what} during the run, and is now {path}; {saved}",
            where=str(self.path),
            fix=f"run the same command again with --output-dir {path}, or move the folder back",
        )

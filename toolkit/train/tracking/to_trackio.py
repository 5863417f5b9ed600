"""Send a run to trackio. The data goes to a Hugging Face Space if the run file names one, else to a
local project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.train.tracking.run_info import RunInfo


class TrackioTracker:
    """Sends metrics with their step, and completions as trackio tables. A resumed run keeps its
    name in trackio.
    """

    def __init__(self, run_info: RunInfo) -> None:
        import trackio  # noqa: PLC0415 - takes seconds, so only for runs that use it

        self._trackio = trackio
        self._run = trackio.init(
            project=run_info.project,
            name=f"{run_info.name}-{run_info.run_id}",  # names are unique in a project
            config=dict(run_info.config),
            resume="allow",
            space_id=run_info.trackio.get("space_id"),
            bucket_id=run_info.trackio.get("bucket_id"),
            embed=False,
        )
        self._run_info = run_info
        space = run_info.trackio.get("space_id")
        location = f"Space {space}" if space else "local"
        self.destination = f"{location}; view it with `trackio show --project {run_info.project}`"

    def log_row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of one training step or evaluation."""
        self._run.log(dict(numbers), step=step)

    def log_table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send completions as a table."""
        if rows:
            names = list(rows[0])
            data = [[row.get(name) for name in names] for row in rows]
            table = self._trackio.Table(columns=names, data=data)
            self._run.log({"completions": table}, step=step)

    def close(self) -> None:
        """Send the queued values and end the run in trackio. If the run file names a static Space,
        create that Space from the data of the run.
        """
        self._run.finish()
        static = self._run_info.trackio.get("static_space_id")
        if static:
            self._trackio.sync(
                project=self._run_info.project,
                sdk="static",
                space_id=static,
                bucket_id=self._run_info.trackio.get("bucket_id"),
                force=True,
            )

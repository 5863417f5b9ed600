"""Write the metrics of a run for TensorBoard, as event files in ``tensorboard/`` of the run
folder.
"""

from __future__ import annotations

import html
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.train.tracking.run_info import RunInfo

FOLDER = "tensorboard"
FLUSH_INTERVAL_S = 10
MAX_CELL_CHARACTERS = 2000  # the maximum number of characters of one cell of a table


class TensorBoardTracker:
    """Writes the metrics as scalars, under their names in metrics.jsonl. The config and the
    completions are written as texts.
    """

    def __init__(self, run_info: RunInfo) -> None:
        writer_class = _summary_writer_class()
        folder = run_info.run_dir / FOLDER
        # With purge_step, TensorBoard hides the steps that an interrupted run logged after its
        # checkpoint. For a new run, it hides everything that an older run left in the folder.
        self._writer = writer_class(
            log_dir=str(folder),
            purge_step=run_info.step + 1 if run_info.resumed else 0,
            flush_secs=FLUSH_INTERVAL_S,
        )
        self.destination = f"tensorboard --logdir {folder}"
        text = json.dumps(run_info.config, indent=2, default=str)
        self._writer.add_text("config", f"```json\n{text}\n```", run_info.step + 1)

    def log_row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write each number of a row as a scalar."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def log_table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write completions as a Markdown table."""
        if rows:
            self._writer.add_text("completions", markdown(rows), step)

    def close(self) -> None:
        """Write the buffered events and close the file."""
        self._writer.close()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of ``rows``. Markup in the values is escaped."""
    names = list(rows[0])
    lines = [f"| {' | '.join(map(_cell, names))} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(_cell(row.get(name)) for name in names)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = text if len(text) <= MAX_CELL_CHARACTERS else f"{text[:MAX_CELL_CHARACTERS]}..."
    escaped = html.escape(text).replace("\\", "&#92;")
    for mark in "|`*_[]":
        escaped = escaped.replace(mark, f"&#{ord(mark)};")
    return escaped.replace("\n", "<br>")


def _summary_writer_class() -> Any:
    """Return the class SummaryWriter of torch. If it is not available, return that of tensorboardX,
    which takes the same arguments.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - takes seconds, so only for runs that use it
    except ImportError:
        import tensorboardX  # noqa: PLC0415 - as above

        return tensorboardX.SummaryWriter
    return SummaryWriter

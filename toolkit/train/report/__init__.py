"""Write report.html: a visual report of a run, created from the files of the run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.paths import write_file
from toolkit.train.report.log_files import read_run
from toolkit.train.report.page import render

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the folder of a run and return its path. The run may be complete,
    partial or empty.

    The report is one self-contained file without secrets. Text that a model wrote is always
    escaped. Raises OSError if the folder cannot be read or written.
    """
    return write_file(run_dir / "report.html", render(read_run(run_dir)))

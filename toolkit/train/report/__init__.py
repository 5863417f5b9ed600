"""report.html: what a run did, to look at rather than to read. Made from the run folder alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.paths import write_file
from toolkit.train.report.log_files import read_run
from toolkit.train.report.page import render

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the folder of a run, whole, partial or empty, and return its path.

    One self-contained file; no secrets, and nothing that a model wrote is taken for markup.
    Raises OSError where the folder cannot be read or written.
    """
    return write_file(run_dir / "report.html", render(read_run(run_dir)))

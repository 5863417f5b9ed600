"""``envcheck calibrate``: compare the sizer's prediction with the memory that a run used.

The output has one row for each term of the memory budget.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.base.formatting import format_bytes
from toolkit.cli.render import format_table

if TYPE_CHECKING:
    from toolkit.sizing.calibrate import Calibration, Row


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(run: Path, as_json: bool) -> None:
    """Compare the measured memory peaks of the run folder RUN with the sizer's prediction.

    The exit code is 1 if a peak is above the predicted bound. Please report such a peak, because it
    is a fault of the sizer.
    """
    from toolkit.sizing.calibrate import calibrate as compare_run  # noqa: PLC0415 - after parsing

    calibration = compare_run(run)
    click.echo(
        json.dumps(calibration.to_json(), indent=2) if as_json else format_calibration(calibration)
    )
    if calibration.is_above_bound:
        sys.exit(1)


def format_calibration(calibration: Calibration) -> str:
    """Return the output for people: the table of memory terms, and whether the peaks are within the
    predicted bound.
    """
    rows, bound = [_row(row) for row in calibration.rows], format_bytes(calibration.bound)
    lines = [format_table(["term", "predicted", "measured", "off"], rows, right=(1, 2, 3))]
    if not calibration.has_measurements:
        lines.append("not measured: the run was not on a GPU")
    elif calibration.is_above_bound:
        lines.append(f"a measured peak is above the predicted bound of {bound}")
    else:
        lines.append(f"all measured peaks are within the predicted bound of {bound}")
    return "\n".join(lines)


def _row(row: Row) -> list[str]:
    measured = "not measured" if row.measured is None else format_bytes(row.measured)
    off = "" if row.relative_error is None else f"{row.relative_error:+.1%}"
    return [row.term, format_bytes(row.predicted), measured, off]

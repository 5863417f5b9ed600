"""Read the files of a run folder for the report. Missing or broken files are not an error, because
an incomplete run gets a report too.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHOWN_STEPS = 4  # the number of steps whose completions are shown
MAX_NUMBER = 1e120  # larger numbers are reduced to this, so that later arithmetic does not overflow
MAX_LINE_BYTES = 1 << 22  # longer lines are skipped


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The content of the files of a run. The content of a missing or broken file is empty.
    ``broken`` lists the names of the broken files.
    """

    name: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    preflight: dict[str, Any]
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    samples: dict[int, list[dict[str, Any]]]
    bad_rewards: int
    finished: bool
    broken: list[str] = field(default_factory=list)


def read_run(run_dir: Path) -> RunFiles:
    """Read the folder of a run. Raises OSError only if the folder itself cannot be read."""
    broken: list[str] = []
    names = {item.name for item in run_dir.iterdir()}
    documents = {
        key: _read_document(run_dir / f"{key}.json", broken)
        for key in ("config", "manifest", "preflight", "evaluation")
    }
    rows = list(_read_rows(run_dir / "metrics.jsonl", broken))
    return RunFiles(
        # The name includes the parent folder, because many run folders are called "run".
        name="/".join(run_dir.resolve().parts[-2:]).lstrip("/"),
        metrics=_by_step(row for row in rows if not _is_eval(row)),
        evals=_by_step(row for row in rows if _is_eval(row)),
        timings=_by_step(_read_rows(run_dir / "timings.jsonl", broken)),
        samples=_read_samples(run_dir / "completions.jsonl", broken),
        bad_rewards=sum(1 for _ in _read_rows(run_dir / "bad_rewards.jsonl", broken)),
        finished=bool(names & {"adapter", "model"}),
        broken=broken,
        **documents,
    )


def finite_number(value: object) -> float | None:
    """``value`` as a float, clamped to ±LARGEST. None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return max(-MAX_NUMBER, min(MAX_NUMBER, number)) if math.isfinite(number) else None


def metric_column(rows: list[dict[str, Any]], *names: str) -> list[float | None]:
    """Return the value of one metric in each row, as a number or None.

    The metric is the first of ``names`` that has a number in at least one row. If there is no such
    metric, all values are None.
    """
    for name in names:
        values = [finite_number(row.get(name)) for row in rows]
        if any(value is not None for value in values):
            return values
    return [None] * len(rows)


def section(document: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The mapping at the path ``keys`` in a JSON document. Empty if the path does not exist."""
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _is_eval(row: dict[str, Any]) -> bool:
    return any(key.startswith("eval/") for key in row)


def _by_step(rows: Any) -> list[dict[str, Any]]:
    """The rows sorted by step. If a step has several rows, only the last row is kept."""
    last_rows = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return [last_rows[step] for step in sorted(last_rows)]


def _read_document(path: Path, broken: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    broken.append(path.name)
    return {}


def _read_rows(path: Path, broken: list[str]) -> Iterator[dict[str, Any]]:
    for _, row in _read_rows_with_offsets(path, broken):
        yield row


def _read_rows_with_offsets(path: Path, broken: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (byte offset, row) for every line that is a JSON object.

    Other lines are skipped. At the end, one text is added to the list ``broken`` if lines that are
    not blank were skipped. The text has the name of the file and the number of these lines.
    """
    bad_lines = 0
    try:
        with path.open("rb") as file:
            offset = 0
            for line in file:
                row = _parse_row(line)
                if row is not None:
                    yield offset, row
                elif line.strip():
                    bad_lines += 1
                offset += len(line)
    except FileNotFoundError:
        return
    except OSError:
        bad_lines += 1
    if bad_lines:
        broken.append(
            f"{path.name} ({bad_lines} incomplete {'line' if bad_lines == 1 else 'lines'})"
        )


def _parse_row(line: bytes) -> dict[str, Any] | None:
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        value = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_samples(path: Path, broken: list[str]) -> dict[int, list[dict[str, Any]]]:
    """Return the completions of a few steps, by step. These steps are evenly spread over the run.

    The completions of all other steps are not loaded, because completions.jsonl can be large.
    """
    offsets: dict[int, list[int]] = {}
    for offset, row in _read_rows_with_offsets(path, broken):
        if isinstance(row.get("step"), int):
            offsets.setdefault(row["step"], []).append(offset)
    if not offsets:
        return {}
    steps = sorted(offsets)
    last = len(steps) - 1
    chosen = sorted({steps[round(last * i / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)})
    samples: dict[int, list[dict[str, Any]]] = {}
    with path.open("rb") as file:
        for step in chosen:
            for offset in offsets[step]:
                file.seek(offset)
                samples.setdefault(step, []).append(_parse_row(file.readline()) or {})
    return samples

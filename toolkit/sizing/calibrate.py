"""Compare predicted with measured memory, using the files in a run folder.

``preflight.json`` has the prediction, ``timings.jsonl`` has the peak of torch's allocator after
each step, and ``memory.json``, if it exists, has the memory that the engine reports.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import InputError
from toolkit.base.files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_TIMINGS_BYTES = 64 << 20
# Each number that the engine reports, with the terms of the budget that it covers.
MEASURED_TERMS = {
    "engine.loaded": ("engine.weights", "engine.lora", "engine.rope_tables"),
    "engine.activations": ("engine.activations",),
    "engine.runtime": ("engine.runtime",),
    "engine.cuda_graphs": ("engine.cuda_graphs",),
    "engine.kv": ("engine.kv",),
    "engine.dequantized": ("engine.dequantized",),
    "trainer.step": (
        "trainer.gradients",
        "trainer.activations",
        "trainer.head",
        "trainer.dequantized",
        "trainer.adapter_copies",
        "trainer.expert_updates",
    ),
}
PEAK_KEYS = {
    "peak.rollout": "rollout_bytes",
    "peak.training": "training_bytes",
    "peak.torch": "torch_bytes",
}


@dataclass(frozen=True, slots=True)
class Row:
    """The predicted and the measured bytes of one term. ``measured`` is None if the run did not
    measure the term.
    """

    term: str
    predicted: int
    measured: int | None

    @property
    def relative_error(self) -> float | None:
        """The relative error of the prediction, (predicted - measured) / measured; None without a
        measurement.
        """
        if not self.measured:
            return None
        return self.predicted / self.measured - 1

    def to_json(self) -> dict[str, Any]:
        return {
            "term": self.term,
            "predicted": self.predicted,
            "measured": self.measured,
            "off": self.relative_error,
        }


@dataclass(frozen=True, slots=True)
class Calibration:
    """The comparison of predicted and measured bytes. ``rows`` has one row for each part and each
    peak of the predicted memory. ``bound`` is the predicted upper bound of the peak of torch's
    allocator.
    """

    rows: tuple[Row, ...]
    bound: int

    @property
    def has_measurements(self) -> bool:
        return any(row.measured is not None for row in self.rows)

    @property
    def is_above_bound(self) -> bool:
        """Whether a measured peak is above the predicted bound."""
        return any(
            row.measured is not None and row.measured > self.bound
            for row in self.rows
            if row.term in PEAK_KEYS
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [row.to_json() for row in self.rows],
            "bound": self.bound,
            "measured": self.has_measurements,
            "above_bound": self.is_above_bound,
        }


def calibrate(run_dir: Path) -> Calibration:
    """Compare the predicted with the measured memory in the files of a run folder. Raises
    InputError if there is no prediction.
    """
    if not (run_dir / "preflight.json").is_file():
        raise InputError(
            "the folder has no preflight.json, so it is not a run folder",
            where=str(run_dir),
            fix="use the run folder, which is the value of runtime.output_dir in a run file",
        )
    preflight = read_json(run_dir / "preflight.json")
    sizing = preflight.get("sizing") if isinstance(preflight, dict) else None
    if not isinstance(sizing, dict):
        raise InputError(
            "the file contains no sizing",
            where=str(run_dir / "preflight.json"),
            fix="use the folder of a run that this version of the toolkit made",
        )
    measured: dict[str, Any] = {}
    if (run_dir / "memory.json").is_file():
        memory = read_json(run_dir / "memory.json")
        measured = memory if isinstance(memory, dict) else {}
    # On the CPU the timings contain the process's resident memory, which has no prediction.
    if sizing.get("device") and (peak := _torch_peak(run_dir / "timings.jsonl")):
        measured.setdefault("peak.torch", peak)
    return compare(sizing, measured)


def compare(sizing: Mapping[str, Any], measured: Mapping[str, Any]) -> Calibration:
    """Compare the predicted and the measured bytes of every term that can be measured.

    ``sizing`` is the prediction, the result of ``SizingResult.to_json()``. ``measured`` maps the
    names in ``MEASURED_TERMS`` and ``PEAK_KEYS`` to bytes.

    Raises InputError if parts of ``sizing`` are missing.
    """
    try:
        predicted = {line["term"]: int(line["bytes"]) for line in sizing["budget"]}
        peaks = sizing["peaks"]
        rows = [
            Row(
                name,
                sum(predicted.get(term, 0) for term in terms),
                _positive_bytes(measured.get(name)),
            )
            for name, terms in MEASURED_TERMS.items()
            if any(term in predicted for term in terms)
        ]
        rows += [
            Row(name, int(peaks[key]), _positive_bytes(measured.get(name)))
            for name, key in PEAK_KEYS.items()
        ]
        return Calibration(tuple(rows), int(peaks["bound_bytes"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the prediction is incomplete: {error!r}") from None


def _positive_bytes(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and value > 0 else None


def _torch_peak(path: Path) -> int | None:
    """The largest torch peak in timings.jsonl; None if the file contains no peak (a run without a
    GPU).
    """
    if not path.is_file() or path.stat().st_size > MAX_TIMINGS_BYTES:
        return None
    largest = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a line truncated by a crash
            if isinstance(row, dict):
                largest = max(largest, _positive_bytes(row.get("peak_memory_bytes")) or 0)
    return largest or None

"""Write a snapshot in Prometheus' text format, for node_exporter's textfile collector. Metrics with
an unknown value are omitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.version import __version__
from toolkit.gpu.devices import cuda_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from toolkit.gpu.checks import CheckResult
    from toolkit.gpu.reading import Reading
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

VERDICT_VALUES = {"ok": 0, "warn": 1, "fail": 2, "unknown": 3}


def _item(reading: Reading[Any], key: str) -> float | None:
    return None if reading.value is None else reading.value[key]


# name of the metric -> (help text, function that returns the value of a card)
_GAUGES: dict[str, tuple[str, Callable[[GpuSnapshot], float | None]]] = {
    "utilization_ratio": (
        "Fraction of time in which a kernel ran.",
        lambda gpu: _scaled(gpu.utilization_percent, 100),
    ),
    "temperature_celsius": ("Temperature of the GPU.", lambda gpu: gpu.temperature_c.value),
    "power_watts": ("Power that the card draws.", lambda gpu: _scaled(gpu.power_mw, 1000)),
    "power_limit_watts": (
        "Enforced power limit.",
        lambda gpu: _scaled(gpu.power_limit_mw, 1000),
    ),
    "ecc_uncorrected_errors": (
        "Uncorrected ECC errors since the driver was loaded.",
        lambda gpu: gpu.ecc_uncorrected.value,
    ),
    "row_remap_pending": (
        "1 if a row remap is pending until a reset.",
        lambda gpu: _item(gpu.remapped_rows, "pending"),
    ),
    "row_remap_failed": (
        "1 if a row could not be remapped.",
        lambda gpu: _item(gpu.remapped_rows, "failure"),
    ),
    "fabric_state": (
        "State of the NVSwitch fabric: 0 none, 1 not started, 2 in progress, 3 ready.",
        lambda gpu: _item(gpu.fabric, "state"),
    ),
    "clock_event_reasons": (
        "NVML bit mask of reasons for lowered clocks.",
        lambda gpu: gpu.clock_reasons.value,
    ),
    "pcie_link_width": ("Lanes of the PCIe link.", lambda gpu: _item(gpu.pcie, "width")),
}


def _scaled(reading: Reading[int], divisor: int) -> float | None:
    return None if reading.value is None else reading.value / divisor


def format_metrics(
    snapshot: NodeSnapshot, results: Sequence[CheckResult] = (), exit_code: int | None = None
) -> str:
    """Return the metrics of a snapshot and of its check results as text. Each metric has a HELP and
    a TYPE line.
    """
    families = [
        _format_family(
            "info", "Versions of the tool and the driver.", [(_version_labels(snapshot), 1)]
        ),
        _format_family(
            "gpu_answers",
            "1 if the card responds, 0 if it is lost.",
            _card_samples(snapshot, lambda g: not g.lost),
        ),
        _format_family(
            "gpu_memory_total_bytes", "Total memory.", _memory_samples(snapshot, "total_bytes")
        ),
        _format_family(
            "gpu_memory_free_bytes", "Free memory.", _memory_samples(snapshot, "free_bytes")
        ),
    ]
    for name, (text, value) in _GAUGES.items():
        families.append(_format_family(f"gpu_{name}", text, _card_samples(snapshot, value)))
    if results:
        samples: list[tuple[dict[str, str], float]] = [
            ({"check": result.id, "blame": result.blame or ""}, VERDICT_VALUES[result.verdict])
            for result in results
        ]
        families.append(
            _format_family("check", "Result of a check: 0 ok, 1 warn, 2 fail, 3 unknown.", samples)
        )
    if exit_code is not None:
        families.append(_format_family("exit_code", "Exit code of the check.", [({}, exit_code)]))
    return "".join(families)


def _version_labels(snapshot: NodeSnapshot) -> dict[str, str]:
    return {"version": __version__, "driver": str(snapshot.driver.version.value or "")}


def _gpu_labels(gpu: GpuSnapshot) -> dict[str, str]:
    return {
        "gpu": str(gpu.index if gpu.parent is None else gpu.parent),
        "slice": "" if gpu.parent is None else str(gpu.index),
        "uuid": str(gpu.uuid.value or ""),
        "name": str(gpu.name.value or ""),
    }


def _cards_and_slices(snapshot: NodeSnapshot) -> list[GpuSnapshot]:
    return [device for gpu in snapshot.gpus for device in (gpu, *gpu.slices)]


def _card_samples(
    snapshot: NodeSnapshot, value: Callable[[GpuSnapshot], float | None]
) -> list[tuple[dict[str, str], float]]:
    values = [(_gpu_labels(gpu), value(gpu)) for gpu in snapshot.gpus]
    return [(labels, float(number)) for labels, number in values if number is not None]


def _memory_samples(snapshot: NodeSnapshot, field: str) -> list[tuple[dict[str, str], float]]:
    memories = [
        (_gpu_labels(gpu), cuda_memory(snapshot, gpu))
        for gpu in _cards_and_slices(snapshot)
        if not gpu.lost
    ]
    return [(labels, getattr(memory, field)) for labels, memory in memories if memory is not None]


def _format_family(name: str, text: str, samples: Sequence[tuple[dict[str, str], float]]) -> str:
    if not samples:
        return ""
    lines = [f"# HELP envcheck_{name} {text}", f"# TYPE envcheck_{name} gauge"]
    for labels, value in samples:
        label_text = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        label_block = f"{{{label_text}}}" if label_text else ""
        number = int(value) if float(value).is_integer() else value
        lines.append(f"envcheck_{name}{label_block} {number}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

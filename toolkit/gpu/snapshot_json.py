"""Convert a snapshot to JSON and back. ``envcheck record`` writes this JSON and ``envcheck replay``
reads it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from toolkit.gpu.host import HostSnapshot
from toolkit.gpu.model_folder import ModelSnapshot
from toolkit.gpu.reading import NOT_QUERIED, Reading, reading_from_json
from toolkit.gpu.snapshot import DriverSnapshot, GpuSnapshot, NodeSnapshot
from toolkit.gpu.software import SoftwareSnapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMAT = 1


def node_to_json(snapshot: NodeSnapshot) -> dict[str, Any]:
    """Return a snapshot as plain objects. ``node_from_json`` is the inverse."""
    return {
        "format": FORMAT,
        "driver": readings_to_json(snapshot.driver),
        "gpus": [gpu_to_json(gpu) for gpu in snapshot.gpus],
        "environment": dict(snapshot.environment),
        "host": readings_to_json(snapshot.host),
        "software": readings_to_json(snapshot.software),
        "model": readings_to_json(snapshot.model),
    }


def readings_to_json(snapshot: Any) -> dict[str, Any]:
    """Return the fields of a snapshot class, each as the JSON of its Reading."""
    return {item.name: getattr(snapshot, item.name).to_json() for item in fields(snapshot)}


_NOT_READINGS = {"index", "parent", "slices"}


def gpu_to_json(gpu: GpuSnapshot) -> dict[str, Any]:
    """Return a card and its slices as plain objects. Fields for which NVML was not queried are
    omitted.
    """
    readings = {
        item.name: getattr(gpu, item.name).to_json()
        for item in fields(gpu)
        if item.name not in _NOT_READINGS and getattr(gpu, item.name) is not NOT_QUERIED
    }
    return {"index": gpu.index, **readings, "slices": [gpu_to_json(part) for part in gpu.slices]}


def readings_from_json(kind: type[Any], data: object) -> dict[str, Reading[Any]]:
    """Return {field: Reading} for the fields of the class ``kind`` that ``data`` contains.

    Raises ValueError if ``data`` is not an object of Readings.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{kind.__name__}: not an object")
    names = {item.name for item in fields(kind)} - _NOT_READINGS
    return {name: reading_from_json(answer) for name, answer in data.items() if name in names}


def gpu_from_json(data: Any, parent: int | None = None, index: int = 0) -> GpuSnapshot:
    """Return the card that ``gpu_to_json`` converted to ``data``. Raises ValueError if ``data`` is
    not a recorded card.
    """
    readings = readings_from_json(GpuSnapshot, data)
    number = data.get("index", index)
    parts: Sequence[Any] = data.get("slices", [])
    if not isinstance(number, int) or not isinstance(parts, list):
        raise ValueError("a GPU must have an integer index and a list of slices")
    slices = tuple(gpu_from_json(part, number, position) for position, part in enumerate(parts))
    return GpuSnapshot(index=number, parent=parent, slices=slices, **readings)


def node_from_json(data: object) -> NodeSnapshot:
    """Return the snapshot that ``node_to_json`` converted to ``data``.

    Raises ValueError if ``data`` is not a recorded node, or is in another version of the format.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"not a snapshot of format {FORMAT}")
    rows, environment = data.get("gpus", []), data.get("environment", {})
    if not isinstance(rows, list) or not isinstance(environment, dict):
        raise ValueError("gpus must be a list, and environment must be an object")
    return NodeSnapshot(
        driver=DriverSnapshot(**readings_from_json(DriverSnapshot, data.get("driver"))),
        gpus=tuple(gpu_from_json(row, index=position) for position, row in enumerate(rows)),
        environment={str(name): str(value) for name, value in environment.items()},
        host=HostSnapshot(**readings_from_json(HostSnapshot, data.get("host"))),
        software=SoftwareSnapshot(**readings_from_json(SoftwareSnapshot, data.get("software"))),
        model=ModelSnapshot(**readings_from_json(ModelSnapshot, data.get("model", {}))),
    )

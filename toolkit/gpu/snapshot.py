"""The classes of a snapshot, which contains the facts about a node as plain values.
``take_snapshot`` reads this node, the checks evaluate its snapshot, and ``record`` writes the
snapshot to a file.

Every fact is a ``Reading``. Therefore a snapshot that was recorded on another node, or on a broken
node, has the same classes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from toolkit.gpu import driver_files, host, model_folder, nvml, software
from toolkit.gpu.reading import NOT_QUERIED, Reading

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """One card or one MIG slice, in NVML's order. For a slice, ``parent`` is the index of its card.

    Units: bytes, mW, MHz, degrees Celsius. The fields with several values are:

    - ``memory``: {total, free, used, reserved, version}.
    - ``fabric``: {state, status, health}.
    - ``remapped_rows``: {correctable, uncorrectable, pending, failure}.
    - ``retired_pages``: {single_bit, double_bit, pending}.
    - ``pcie``: {generation, max_generation, width, max_width}.
    - ``clocks_mhz``: {sm, max_sm, memory, max_memory}.
    """

    index: int
    parent: int | None = None
    slices: tuple[GpuSnapshot, ...] = ()
    state: Reading[str] = NOT_QUERIED
    name: Reading[str] = NOT_QUERIED
    uuid: Reading[str] = NOT_QUERIED
    pci_bus_id: Reading[str] = NOT_QUERIED
    minor: Reading[int] = NOT_QUERIED
    compute_capability: Reading[list[int]] = NOT_QUERIED
    memory: Reading[dict[str, Any]] = NOT_QUERIED
    processes: Reading[list[dict[str, Any]]] = NOT_QUERIED
    utilization_percent: Reading[int] = NOT_QUERIED
    mig_mode: Reading[list[int]] = NOT_QUERIED
    gpu_instance: Reading[int] = NOT_QUERIED
    compute_instance: Reading[int] = NOT_QUERIED
    ecc_mode: Reading[int] = NOT_QUERIED
    ecc_uncorrected: Reading[int] = NOT_QUERIED
    ecc_uncorrected_lifetime: Reading[int] = NOT_QUERIED
    ecc_corrected: Reading[int] = NOT_QUERIED
    remapped_rows: Reading[dict[str, int]] = NOT_QUERIED
    retired_pages: Reading[dict[str, int]] = NOT_QUERIED
    recovery_action: Reading[int] = NOT_QUERIED
    fabric: Reading[dict[str, int | None]] = NOT_QUERIED
    persistence_mode: Reading[int] = NOT_QUERIED
    compute_mode: Reading[int] = NOT_QUERIED
    performance_state: Reading[int] = NOT_QUERIED
    clock_reasons: Reading[int] = NOT_QUERIED
    clocks_mhz: Reading[dict[str, int]] = NOT_QUERIED
    temperature_c: Reading[int] = NOT_QUERIED
    slowdown_c: Reading[int] = NOT_QUERIED
    power_mw: Reading[int] = NOT_QUERIED
    power_limit_mw: Reading[int] = NOT_QUERIED
    power_default_mw: Reading[int] = NOT_QUERIED
    pcie: Reading[dict[str, int]] = NOT_QUERIED
    nvlinks: Reading[list[int]] = NOT_QUERIED

    @property
    def total_bytes(self) -> int | None:
        """The total memory of the card or slice, as NVML reports it. None if NVML does not
        report it.
        """
        return None if self.memory.value is None else int(self.memory.value["total"])

    @property
    def free_bytes(self) -> int | None:
        """The free memory of the card or slice, as NVML reports it. None if NVML does not
        report it.
        """
        return None if self.memory.value is None else int(self.memory.value["free"])

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability as (major, minor); None if it is unknown."""
        value = self.compute_capability.value
        return None if value is None else (int(value[0]), int(value[1]))

    @property
    def lost(self) -> bool:
        """Whether the card does not respond."""
        return not self.state.has_value

    @property
    def label(self) -> str:
        """The name of this card or slice in messages: ``GPU 3`` for a card, ``GPU 3 MIG 1`` for a
        slice.
        """
        return f"GPU {self.index}" if self.parent is None else f"GPU {self.parent} MIG {self.index}"


@dataclass(frozen=True, slots=True)
class DriverSnapshot:
    """What is known about the driver. ``nvml`` is the version of NVML, or the reason why NVML did
    not start. ``version`` is the version of the driver.

    ``p2p`` has [i, j, status] for each pair of cards (status 0 is OK). The fields after ``p2p`` are
    read by the module ``driver_files``.
    """

    nvml: Reading[str] = NOT_QUERIED
    version: Reading[str] = NOT_QUERIED
    p2p: Reading[list[list[int]]] = NOT_QUERIED
    kernel_module: Reading[str] = NOT_QUERIED
    libcuda: Reading[list[dict[str, Any]]] = NOT_QUERIED
    device_nodes: Reading[list[dict[str, Any]]] = NOT_QUERIED
    pci_gpus: Reading[int] = NOT_QUERIED
    kernel_log: Reading[list[dict[str, Any]]] = NOT_QUERIED
    mps: Reading[bool] = NOT_QUERIED


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """The facts about one node at one moment. ``environment`` contains only the environment
    variables that checks read.
    """

    driver: DriverSnapshot = field(default_factory=DriverSnapshot)
    gpus: tuple[GpuSnapshot, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    host: host.HostSnapshot = field(default_factory=host.HostSnapshot)
    software: software.SoftwareSnapshot = field(default_factory=software.SoftwareSnapshot)
    model: model_folder.ModelSnapshot = field(default_factory=model_folder.ModelSnapshot)


def take_snapshot(
    *,
    paths: Mapping[str, Path] | None = None,
    model: str | None = None,
    revision: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> NodeSnapshot:
    """Return the snapshot of this node: NVML, the host and the installed software. Writes nothing
    and needs no privileges.

    Args:
        paths: the folders whose disks are read, by role (``output_dir``, ``HF_HOME`` ...). For a
            folder that does not exist yet, its nearest existing parent is used.
        model: the folder or hub id of the model whose files are read.
        revision: the revision of ``model`` on the hub.
        environ: the environment variables to use instead of ``os.environ``.
    """
    variables = os.environ if environ is None else environ
    driver, gpus = _query_nvml()
    model_snapshot = model_folder.ModelSnapshot()
    if model is not None:
        model_snapshot = model_folder.read(model, revision, variables)
    return NodeSnapshot(
        model=model_snapshot,
        driver=replace(driver, **driver_files.read(variables)),
        gpus=gpus,
        environment=host.recorded_variables(variables),
        host=host.read(variables, paths or {}),
        software=software.read(variables),
    )


def _query_nvml() -> tuple[DriverSnapshot, tuple[GpuSnapshot, ...]]:
    nvml_readings = nvml.read()
    gpus = []
    for index, (readings, slices) in enumerate(nvml_readings.gpus):
        mig_slices = tuple(
            GpuSnapshot(
                index=number,
                parent=index,
                **{
                    "state": readings["state"],
                    "compute_capability": readings["compute_capability"],
                    **slice_readings,
                },
            )
            for number, slice_readings in enumerate(slices)
        )
        gpus.append(GpuSnapshot(index=index, slices=mig_slices, **readings))
    return DriverSnapshot(
        nvml_readings.start, nvml_readings.driver_version, nvml_readings.p2p
    ), tuple(gpus)

"""The classes of a snapshot, which contains the facts about a node as plain values. ``take`` reads
this node, the checks evaluate its snapshot, and ``record`` writes the snapshot to a file.

Every fact is a ``Reading``. Therefore a snapshot that was recorded on another node, or on a broken
node, has the same classes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from toolkit.gpu import driver_files, host, model_folder, nvml, software
from toolkit.gpu.reading import NOT_ASKED, Reading

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
    state: Reading[str] = NOT_ASKED
    name: Reading[str] = NOT_ASKED
    uuid: Reading[str] = NOT_ASKED
    pci_bus_id: Reading[str] = NOT_ASKED
    minor: Reading[int] = NOT_ASKED
    compute_capability: Reading[list[int]] = NOT_ASKED
    memory: Reading[dict[str, Any]] = NOT_ASKED
    processes: Reading[list[dict[str, Any]]] = NOT_ASKED
    utilization_percent: Reading[int] = NOT_ASKED
    mig_mode: Reading[list[int]] = NOT_ASKED
    gpu_instance: Reading[int] = NOT_ASKED
    compute_instance: Reading[int] = NOT_ASKED
    ecc_mode: Reading[int] = NOT_ASKED
    ecc_uncorrected: Reading[int] = NOT_ASKED
    ecc_uncorrected_lifetime: Reading[int] = NOT_ASKED
    ecc_corrected: Reading[int] = NOT_ASKED
    remapped_rows: Reading[dict[str, int]] = NOT_ASKED
    retired_pages: Reading[dict[str, int]] = NOT_ASKED
    recovery_action: Reading[int] = NOT_ASKED
    fabric: Reading[dict[str, int | None]] = NOT_ASKED
    persistence_mode: Reading[int] = NOT_ASKED
    compute_mode: Reading[int] = NOT_ASKED
    performance_state: Reading[int] = NOT_ASKED
    clock_reasons: Reading[int] = NOT_ASKED
    clocks_mhz: Reading[dict[str, int]] = NOT_ASKED
    temperature_c: Reading[int] = NOT_ASKED
    slowdown_c: Reading[int] = NOT_ASKED
    power_mw: Reading[int] = NOT_ASKED
    power_limit_mw: Reading[int] = NOT_ASKED
    power_default_mw: Reading[int] = NOT_ASKED
    pcie: Reading[dict[str, int]] = NOT_ASKED
    nvlinks: Reading[list[int]] = NOT_ASKED

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
        return not self.state.known

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

    ``p2p`` has [i, j, status] for each pair of cards (status 0 is OK). ``driver_files`` reads the
    other fields.
    """

    nvml: Reading[str] = NOT_ASKED
    version: Reading[str] = NOT_ASKED
    p2p: Reading[list[list[int]]] = NOT_ASKED
    kernel_module: Reading[str] = NOT_ASKED
    libcuda: Reading[list[dict[str, Any]]] = NOT_ASKED
    device_nodes: Reading[list[dict[str, Any]]] = NOT_ASKED
    pci_gpus: Reading[int] = NOT_ASKED
    kernel_log: Reading[list[dict[str, Any]]] = NOT_ASKED
    mps: Reading[bool] = NOT_ASKED


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


def take(
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
    driver, gpus = _ask_nvml()
    look = model_folder.ModelSnapshot()
    if model is not None:
        look = model_folder.read(model, revision, variables)
    return NodeSnapshot(
        model=look,
        driver=replace(driver, **driver_files.read(variables)),
        gpus=gpus,
        environment=host.relevant(variables),
        host=host.read(variables, paths or {}),
        software=software.read(variables),
    )


def _ask_nvml() -> tuple[DriverSnapshot, tuple[GpuSnapshot, ...]]:
    answers = nvml.read()
    gpus = []
    for index, (row, slices) in enumerate(answers.gpus):
        parts = tuple(
            GpuSnapshot(
                index=number,
                parent=index,
                **{"state": row["state"], "compute_capability": row["compute_capability"], **part},
            )
            for number, part in enumerate(slices)
        )
        gpus.append(GpuSnapshot(index=index, slices=parts, **row))
    return DriverSnapshot(answers.start, answers.driver_version, answers.p2p), tuple(gpus)

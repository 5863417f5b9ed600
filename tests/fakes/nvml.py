"""A libnvidia-ml that answers from a recorded snapshot, at the level of pynvml's function table.

pynvml looks every C function up as an attribute of ``pynvml.nvmlLib`` and calls it with ctypes
arguments; ``install`` puts a ``FakeNvml`` there, so pynvml itself (its structs, its buffer sizes,
its error classes) is the real one. The package does not contain this module.

``quirks`` say what readings cannot: ``missing`` lists the C functions that an old driver does not
have, ``hang_s`` is the time in seconds that the initialization takes, and ``lost_handle`` is the
index of a GPU that gives no handle.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

from nvml_table import (
    INSUFFICIENT_SIZE,
    INVALID_ARGUMENT,
    LOST,
    NO_MEMORY_FIGURE,
    NO_SUCH_LIBRARY,
    NOT_FOUND,
    SLICE_BASE,
    SUCCESS,
    VERSION_MISMATCH,
    Failure,
    FunctionTable,
    number_of,
    recorded,
    set_handle,
    target,
)

PLAIN = {
    "nvmlDeviceGetMinorNumber": recorded("minor"),
    "nvmlDeviceGetPersistenceMode": recorded("persistence_mode"),
    "nvmlDeviceGetComputeMode": recorded("compute_mode"),
    "nvmlDeviceGetPerformanceState": recorded("performance_state"),
    "nvmlDeviceGetCurrentClocksEventReasons": recorded("clock_reasons"),
    "nvmlDeviceGetCurrentClocksThrottleReasons": recorded("clock_reasons"),
    "nvmlDeviceGetPowerUsage": recorded("power_mw"),
    "nvmlDeviceGetEnforcedPowerLimit": recorded("power_limit_mw"),
    "nvmlDeviceGetPowerManagementDefaultLimit": recorded("power_default_mw"),
    "nvmlDeviceGetCurrPcieLinkGeneration": recorded("pcie", "generation"),
    "nvmlDeviceGetMaxPcieLinkGeneration": recorded("pcie", "max_generation"),
    "nvmlDeviceGetCurrPcieLinkWidth": recorded("pcie", "width"),
    "nvmlDeviceGetMaxPcieLinkWidth": recorded("pcie", "max_width"),
    "nvmlDeviceGetGpuInstanceId": recorded("gpu_instance"),
    "nvmlDeviceGetComputeInstanceId": recorded("compute_instance"),
}


class FakeNvml(FunctionTable):
    """NVML's functions, for one node."""

    plain = PLAIN

    # The system.

    def c_nvmlInitWithFlags(self, _flags: Any) -> None:
        time.sleep(self.quirks.get("hang_s", 0))
        self.unwrap(self.node["driver"]["nvml"])

    def c_nvmlShutdown(self) -> None:
        return None

    def c_nvmlErrorString(self, code: Any) -> bytes:
        return f"Error {number_of(code)}".encode()

    def c_nvmlSystemGetNVMLVersion(self, buffer: Any, _size: Any) -> None:
        buffer.value = self.unwrap(self.node["driver"]["nvml"]).encode()

    def c_nvmlSystemGetDriverVersion(self, buffer: Any, _size: Any) -> None:
        buffer.value = self.unwrap(self.node["driver"]["version"]).encode()

    def c_nvmlDeviceGetCount_v2(self, count: Any) -> None:
        target(count).value = len(self.node["gpus"])

    def c_nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> None:
        row = self.node["gpus"][number_of(index)]
        if self.quirks.get("lost_handle") == number_of(index):
            self.unwrap(row["state"])
        set_handle(device, number_of(index) + 1)

    # Texts and numbers.

    def c_nvmlDeviceGetName(self, handle: Any, buffer: Any, _size: Any) -> None:
        buffer.value = self.value(handle, "name").encode()

    def c_nvmlDeviceGetUUID(self, handle: Any, buffer: Any, _size: Any) -> None:
        buffer.value = self.value(handle, "uuid").encode()

    def c_nvmlDeviceGetPciInfo_v3(self, handle: Any, info: Any) -> None:
        target(info).busId = self.value(handle, "pci_bus_id").encode()

    def c_nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> None:
        target(major).value, target(minor).value = self.value(handle, "compute_capability")

    def c_nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> None:
        target(rates).gpu = self.value(handle, "utilization_percent")

    def c_nvmlDeviceGetEccMode(self, handle: Any, current: Any, pending: Any) -> None:
        target(current).value = target(pending).value = self.value(handle, "ecc_mode")

    def c_nvmlDeviceGetTotalEccErrors(
        self, handle: Any, kind: Any, counter: Any, count: Any
    ) -> None:
        names = {
            (1, 0): "ecc_uncorrected",
            (1, 1): "ecc_uncorrected_lifetime",
            (0, 0): "ecc_corrected",
        }
        name = names[number_of(kind), number_of(counter)]
        target(count).value = self.value(handle, name)

    def c_nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, clock: Any) -> None:
        name = {1: "sm", 2: "memory"}[number_of(kind)]
        target(clock).value = self.value(handle, "clocks_mhz")[name]

    def c_nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: Any, clock: Any) -> None:
        name = {1: "max_sm", 2: "max_memory"}[number_of(kind)]
        target(clock).value = self.value(handle, "clocks_mhz")[name]

    def c_nvmlDeviceGetTemperature(self, handle: Any, _sensor: Any, degrees: Any) -> None:
        target(degrees).value = self.value(handle, "temperature_c")

    def c_nvmlDeviceGetTemperatureV(self, handle: Any, info: Any) -> None:
        target(info).temperature = self.value(handle, "temperature_c")

    def c_nvmlDeviceGetTemperatureThreshold(self, handle: Any, _kind: Any, degrees: Any) -> None:
        target(degrees).value = self.value(handle, "slowdown_c")

    # Structures.

    def _memory(self, handle: Any, version: int) -> dict[str, Any]:
        memory = self.value(handle, "memory")
        if version > memory["version"]:
            raise Failure(VERSION_MISMATCH)
        return dict(memory)

    def c_nvmlDeviceGetMemoryInfo_v2(self, handle: Any, info: Any) -> None:
        memory, out = self._memory(handle, 2), target(info)
        if out.version != 0x02000028:
            raise Failure(VERSION_MISMATCH)
        out.total, out.free, out.used = memory["total"], memory["free"], memory["used"]
        out.reserved = memory["reserved"]

    def c_nvmlDeviceGetMemoryInfo(self, handle: Any, info: Any) -> None:
        memory, out = self._memory(handle, 1), target(info)
        out.total, out.free, out.used = memory["total"], memory["free"], memory["used"]

    def _processes(self, kind: str, handle: Any, count: Any, buffer: Any) -> None:
        rows = [row for row in self.value(handle, "processes") if row["kind"] == kind]
        room = target(count).value
        if not rows:
            target(count).value = 0
            return
        if buffer is None or room < len(rows):
            target(count).value = len(rows)
            raise Failure(INSUFFICIENT_SIZE)
        for slot, row in zip(buffer, rows, strict=False):
            slot.pid = row["pid"]
            used = row["used_bytes"]
            slot.usedGpuMemory = NO_MEMORY_FIGURE if used is None else used
        target(count).value = len(rows)

    def c_nvmlDeviceGetComputeRunningProcesses_v3(self, *arguments: Any) -> None:
        self._processes("compute", *arguments)

    def c_nvmlDeviceGetGraphicsRunningProcesses_v3(self, *arguments: Any) -> None:
        self._processes("graphics", *arguments)

    c_nvmlDeviceGetComputeRunningProcesses_v2 = c_nvmlDeviceGetComputeRunningProcesses_v3
    c_nvmlDeviceGetGraphicsRunningProcesses_v2 = c_nvmlDeviceGetGraphicsRunningProcesses_v3

    def c_nvmlDeviceGetRemappedRows(self, handle: Any, *counters: Any) -> None:
        rows = self.value(handle, "remapped_rows")
        for counter, name in zip(
            counters, ("correctable", "uncorrectable", "pending", "failure"), strict=True
        ):
            target(counter).value = rows[name]

    def c_nvmlDeviceGetRetiredPages(self, handle: Any, cause: Any, count: Any, _pages: Any) -> None:
        pages = self.value(handle, "retired_pages")
        target(count).value = pages["double_bit" if number_of(cause) else "single_bit"]

    def c_nvmlDeviceGetRetiredPagesPendingStatus(self, handle: Any, pending: Any) -> None:
        target(pending).value = self.value(handle, "retired_pages")["pending"]

    def c_nvmlDeviceGetGpuFabricInfoV(self, handle: Any, info: Any) -> None:
        fabric, out = self.value(handle, "fabric"), target(info)
        if hasattr(out, "healthSummary"):
            if fabric["health"] is None:
                raise Failure(VERSION_MISMATCH)
            out.healthSummary = fabric["health"]
        out.state, out.status = fabric["state"], fabric["status"]

    def c_nvmlDeviceGetFieldValues(self, handle: Any, count: Any, values: Any) -> None:
        assert number_of(count) == 1
        slot = target(values)[0]
        assert slot.fieldId == 230, "the toolkit asks for this field only"
        try:
            slot.value.uiVal, slot.nvmlReturn = self.value(handle, "recovery_action"), SUCCESS
        except Failure as failure:
            if failure.code == LOST:
                raise
            slot.nvmlReturn = failure.code

    def c_nvmlDeviceGetNvLinkState(self, handle: Any, link: Any, active: Any) -> None:
        links = self.value(handle, "nvlinks")
        if number_of(link) >= len(links):
            raise Failure(INVALID_ARGUMENT)
        target(active).value = links[number_of(link)]

    def c_nvmlDeviceGetP2PStatus(self, one: Any, other: Any, _kind: Any, status: Any) -> None:
        pairs = self.unwrap(self.node["driver"].get("p2p"))
        indices = [ctypes.cast(handle, ctypes.c_void_p).value - 1 for handle in (one, other)]
        target(status).value = next(row[2] for row in pairs if row[:2] == indices)

    # MIG.

    def c_nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> None:
        target(current).value, target(pending).value = self.value(handle, "mig_mode")

    def c_nvmlDeviceGetMaxMigDeviceCount(self, _handle: Any, count: Any) -> None:
        target(count).value = 7

    def c_nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: Any, part: Any) -> None:
        if number_of(index) >= len(self.row(handle).get("slices", ())):
            raise Failure(NOT_FOUND)
        card = ctypes.cast(handle, ctypes.c_void_p).value
        set_handle(part, card * SLICE_BASE + number_of(index) + 1)


def install(node: dict[str, Any], quirks: dict[str, Any] | None = None) -> FakeNvml:
    """Make pynvml read this node for the rest of the process.

    If the node has no NVML library (code 12), pynvml is unchanged, and its loader really fails.
    """
    import pynvml

    fake = FakeNvml(node, quirks)
    start = node["driver"]["nvml"]
    if start.get("code") != NO_SUCH_LIBRARY:
        pynvml.nvmlLib = fake
        pynvml._nvmlGetFunctionPointer_cache.clear()
    return fake

"""The NVML queries about a card. ``GPU_QUERIES`` maps each field of ``GpuSnapshot`` to a query,
which is a function.

A query gets the pynvml module and a device handle. It returns plain values that JSON can represent.
A query does not catch NVMLError, because its caller ``nvml.run_query`` records the error. Units are
those of NVML: bytes (never MiB), mW, MHz, degrees Celsius.
"""

from __future__ import annotations

import os
from ctypes import byref
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Query = Callable[[Any, Any], Any]

RECOVERY_ACTION_FIELD = 230  # NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
_UNCORRECTED, _CORRECTED = 1, 0
_VOLATILE, _AGGREGATE = 0, 1
_SM, _MEMORY = 1, 2
_SLOWDOWN = 1


def first_supported(nvml: Any, *queries: Callable[[], Any]) -> Any:
    """Return the result of the first of ``queries`` that the driver supports. The newest query
    comes first. A driver that is too old for it gets the next query.
    """
    for query in queries[:-1]:
        try:
            return query()
        except (nvml.NVMLLibraryMismatchError, nvml.NVMLError_FunctionNotFound):
            continue
        except nvml.NVMLError as error:
            if int(error.value) != nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH:
                raise
    return queries[-1]()


def memory(nvml: Any, handle: Any) -> dict[str, Any]:
    """Return the memory of a card in bytes. Version 2 of the NVML call reports the memory that the
    driver reserves as a separate value. Version 1 counts this memory as used.
    """

    def version_2() -> dict[str, Any]:
        info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return {
            "total": int(info.total),
            "free": int(info.free),
            "used": int(info.used),
            "reserved": int(info.reserved),
            "version": 2,
        }

    def version_1() -> dict[str, Any]:
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            "total": int(info.total),
            "free": int(info.free),
            "used": int(info.used),
            "reserved": None,
            "version": 1,
        }

    answer: dict[str, Any] = first_supported(nvml, version_2, version_1)
    return answer


def processes(nvml: Any, handle: Any) -> list[dict[str, Any]]:
    """Return the processes that use memory of the card, each with its pid, bytes (None if hidden),
    kind, name, and whether it is this process.

    In a container, NVML may report no processes, or pids that do not exist in the container. In the
    second case ``name`` is None.
    """
    kinds = (
        ("compute", "nvmlDeviceGetComputeRunningProcesses"),
        ("graphics", "nvmlDeviceGetGraphicsRunningProcesses"),
    )
    rows: list[dict[str, Any]] = []
    for kind, call in kinds:
        versions = (partial(getattr(nvml, f"{call}_{version}"), handle) for version in ("v3", "v2"))
        for process in first_supported(nvml, *versions):
            used = process.usedGpuMemory
            rows.append(
                {
                    "pid": int(process.pid),
                    "used_bytes": None if used is None else int(used),
                    "kind": kind,
                    "name": _process_name(int(process.pid)),
                    "mine": int(process.pid) == os.getpid(),
                }
            )
    return rows


def _process_name(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read(64).strip()
    except OSError:
        return None


def fabric(nvml: Any, handle: Any) -> dict[str, int | None]:
    """Return {state, status, health} of the NVSwitch fabric. The ``state`` 3 means ready.
    ``status`` is an NVML code that is valid only in state 3. ``health`` is None with older drivers.
    """

    def newer(kind: Any) -> dict[str, int | None]:
        info = kind()
        nvml.nvmlDeviceGetGpuFabricInfoV(handle, byref(info))
        summary = getattr(info, "healthSummary", None)
        return {"state": int(info.state), "status": int(info.status), "health": summary}

    def oldest() -> dict[str, int | None]:
        info = nvml.c_nvmlGpuFabricInfo_t()
        nvml.nvmlDeviceGetGpuFabricInfo(handle, byref(info))
        return {"state": int(info.state), "status": int(info.status), "health": None}

    versions = [
        getattr(nvml, name)
        for name in ("c_nvmlGpuFabricInfo_v3_t", "c_nvmlGpuFabricInfo_v2_t")
        if hasattr(nvml, name)
    ]
    answer: dict[str, int | None] = first_supported(
        nvml, *(partial(newer, kind) for kind in versions), oldest
    )
    return answer


def remapped_rows(nvml: Any, handle: Any) -> dict[str, int]:
    """Return {correctable, uncorrectable, pending, failure} for cards since Ampere: how many memory
    rows were remapped because of correctable and of uncorrectable errors, whether a remap is
    pending, and whether a remap has failed.
    """
    correctable, uncorrectable, pending, failure = nvml.nvmlDeviceGetRemappedRows(handle)
    return {
        "correctable": int(correctable),
        "uncorrectable": int(uncorrectable),
        "pending": int(pending),
        "failure": int(failure),
    }


def retired_pages(nvml: Any, handle: Any) -> dict[str, int]:
    """Return {single_bit, double_bit, pending}, for cards before Ampere. ``single_bit`` is the
    number of memory pages that were retired because of several single-bit errors. ``double_bit`` is
    the number of pages that were retired because of a double-bit error. ``pending`` is 1 if a
    retirement is pending, else 0.
    """
    return {
        "single_bit": len(nvml.nvmlDeviceGetRetiredPages(handle, 0)),
        "double_bit": len(nvml.nvmlDeviceGetRetiredPages(handle, 1)),
        "pending": int(nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle)),
    }


def pcie(nvml: Any, handle: Any) -> dict[str, int]:
    """Return the current and the maximum generation and width of the PCIe link. To save power, an
    idle card lowers the generation, but not the width.
    """
    return {
        "generation": int(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
        "max_generation": int(nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        "width": int(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        "max_width": int(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
    }


def clocks(nvml: Any, handle: Any) -> dict[str, int]:
    """Return the current and the maximum clocks of the SMs and of the memory, in MHz."""
    return {
        "sm": int(nvml.nvmlDeviceGetClockInfo(handle, _SM)),
        "max_sm": int(nvml.nvmlDeviceGetMaxClockInfo(handle, _SM)),
        "memory": int(nvml.nvmlDeviceGetClockInfo(handle, _MEMORY)),
        "max_memory": int(nvml.nvmlDeviceGetMaxClockInfo(handle, _MEMORY)),
    }


def clock_reasons(nvml: Any, handle: Any) -> int:
    """Return NVML's bit mask of the reasons why the clocks are lowered. Drivers before 535 call
    these reasons throttle reasons.
    """
    return int(
        first_supported(
            nvml,
            lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        )
    )


def temperature(nvml: Any, handle: Any) -> int:
    """Return the temperature of the GPU in degrees Celsius."""
    return int(
        first_supported(
            nvml,
            lambda: nvml.nvmlDeviceGetTemperatureV(handle, 0),
            lambda: nvml.nvmlDeviceGetTemperature(handle, 0),
        )
    )


GPU_QUERIES: tuple[tuple[str, Query], ...] = (
    ("name", lambda n, h: n.nvmlDeviceGetName(h)),
    ("uuid", lambda n, h: n.nvmlDeviceGetUUID(h)),
    ("pci_bus_id", lambda n, h: _text(n.nvmlDeviceGetPciInfo_v3(h).busId)),
    ("minor", lambda n, h: int(n.nvmlDeviceGetMinorNumber(h))),
    ("compute_capability", lambda n, h: list(n.nvmlDeviceGetCudaComputeCapability(h))),
    ("memory", memory),
    ("processes", processes),
    ("utilization_percent", lambda n, h: int(n.nvmlDeviceGetUtilizationRates(h).gpu)),
    ("mig_mode", lambda n, h: list(n.nvmlDeviceGetMigMode(h))),
    ("ecc_mode", lambda n, h: int(n.nvmlDeviceGetEccMode(h)[0])),
    (
        "ecc_uncorrected",
        lambda n, h: int(n.nvmlDeviceGetTotalEccErrors(h, _UNCORRECTED, _VOLATILE)),
    ),
    (
        "ecc_uncorrected_lifetime",
        lambda n, h: int(n.nvmlDeviceGetTotalEccErrors(h, _UNCORRECTED, _AGGREGATE)),
    ),
    ("ecc_corrected", lambda n, h: int(n.nvmlDeviceGetTotalEccErrors(h, _CORRECTED, _VOLATILE))),
    ("remapped_rows", remapped_rows),
    ("retired_pages", retired_pages),
    ("fabric", fabric),
    ("persistence_mode", lambda n, h: int(n.nvmlDeviceGetPersistenceMode(h))),
    ("compute_mode", lambda n, h: int(n.nvmlDeviceGetComputeMode(h))),
    ("performance_state", lambda n, h: int(n.nvmlDeviceGetPerformanceState(h))),
    ("clock_reasons", clock_reasons),
    ("clocks_mhz", clocks),
    ("temperature_c", temperature),
    ("slowdown_c", lambda n, h: int(n.nvmlDeviceGetTemperatureThreshold(h, _SLOWDOWN))),
    ("power_mw", lambda n, h: int(n.nvmlDeviceGetPowerUsage(h))),
    ("power_limit_mw", lambda n, h: int(n.nvmlDeviceGetEnforcedPowerLimit(h))),
    ("power_default_mw", lambda n, h: int(n.nvmlDeviceGetPowerManagementDefaultLimit(h))),
    ("pcie", pcie),
)

SLICE_QUERIES: tuple[tuple[str, Query], ...] = (
    ("name", lambda n, h: n.nvmlDeviceGetName(h)),
    ("uuid", lambda n, h: n.nvmlDeviceGetUUID(h)),
    ("memory", memory),
    ("processes", processes),
    ("gpu_instance", lambda n, h: int(n.nvmlDeviceGetGpuInstanceId(h))),
    ("compute_instance", lambda n, h: int(n.nvmlDeviceGetComputeInstanceId(h))),
)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

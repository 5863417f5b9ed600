"""Read the state of the GPUs from NVML, one query at a time.

This is the only module that imports pynvml. Every result is a ``Reading``, so a lost card affects
only its own readings. No setting of a card is changed. ``nvmlSystemGetCudaDriverVersion`` is not
called, because it opens libcuda. The newest CUDA version that a driver supports is found from the
driver's version instead.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from toolkit.gpu.nvml_queries import GPU_QUERIES, RECOVERY_ACTION_FIELD, SLICE_QUERIES
from toolkit.gpu.reading import Reading, failed, succeeded, unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

# A failing driver can block a query for ever (processes in state D). This limit is far above the
# time that a healthy node needs (8 cards without persistence mode take some seconds to initialize).
DEADLINE_S = 30.0

# NVML's codes for a query that is not supported: NOT_SUPPORTED, FUNCTION_NOT_FOUND,
# VGPU_ECC_NOT_SUPPORTED, ARGUMENT_VERSION_MISMATCH, DEPRECATED
_UNSUPPORTED_CODES = {3, 13, 22, 25, 26}
GPU_IS_LOST = 15
MAX_NVLINKS = 18

Readings = dict[str, Any]  # field name -> Reading[Any]


@dataclass
class NvmlReadings:
    """The results of all NVML queries. ``start`` is the version of NVML, or the reason why NVML did
    not start.

    ``gpus`` contains a pair for each card: the readings of the card, and a list with the readings
    of each of its MIG slices. The readings of a card or slice are a mapping from the name of a
    field of ``GpuSnapshot`` to a ``Reading``.
    """

    start: Reading[str]
    driver_version: Reading[str]
    gpus: list[tuple[Readings, list[Readings]]] = field(default_factory=list)
    p2p: Reading[list[list[int]]] = field(
        default_factory=lambda: unsupported("fewer than two GPUs")
    )


def run_query(nvml: Any, query: Callable[..., Any], *arguments: Any) -> Reading[Any]:
    """Call ``query`` and return its result as a Reading.

    If the driver does not support the query, the Reading is "not supported"; after any other error
    it is "failed". Newer versions of pynvml raise NVMLLibraryMismatchError if the driver is too old
    for the query. This exception is not a subclass of NVMLError.
    """
    try:
        return succeeded(query(*arguments))
    except nvml.NVMLLibraryMismatchError:
        return unsupported("Function Not Found", 13)
    except nvml.NVMLError as error:
        code = int(error.value)
        kind = unsupported if code in _UNSUPPORTED_CODES else failed
        return kind(str(error), code)
    except UnicodeDecodeError:
        return failed("a result that is not text")


def read(deadline_s: float = DEADLINE_S) -> NvmlReadings:
    """Return the results of all NVML queries on this node. If the driver does not respond within
    ``deadline_s`` seconds, the field ``start`` has the reason, and no other query has a value.
    """
    results: list[NvmlReadings] = []
    worker = threading.Thread(target=lambda: results.append(_query_all()), name="nvml", daemon=True)
    worker.start()
    worker.join(deadline_s)
    if results:
        return results[0]
    no_response: Reading[str] = failed(
        f"NVML did not respond within {deadline_s:g} s"
        if worker.is_alive()
        else "NVML could not be queried"
    )
    return NvmlReadings(start=no_response, driver_version=no_response)


def _query_all() -> NvmlReadings:
    import pynvml  # noqa: PLC0415 - takes 15 ms, and only these commands need it

    start = run_query(pynvml, pynvml.nvmlInit)
    if not start.has_value:
        return NvmlReadings(start=start, driver_version=start)
    try:
        answers = NvmlReadings(
            start=run_query(pynvml, pynvml.nvmlSystemGetNVMLVersion),
            driver_version=run_query(pynvml, pynvml.nvmlSystemGetDriverVersion),
        )
        count = run_query(pynvml, pynvml.nvmlDeviceGetCount)
        if not count.has_value:
            answers.start = count
            return answers
        handles = [_device_handle(pynvml, index) for index in range(count.value or 0)]
        answers.gpus = [_query_gpu(pynvml, handle) for handle in handles]
        reachable = [
            (index, handle.value) for index, handle in enumerate(handles) if handle.has_value
        ]
        answers.p2p = _query_peer_access(pynvml, reachable)
        return answers
    finally:
        run_query(pynvml, pynvml.nvmlShutdown)


def _device_handle(nvml: Any, index: int) -> Reading[Any]:
    return run_query(nvml, nvml.nvmlDeviceGetHandleByIndex, index)


def _query_gpu(nvml: Any, handle: Reading[Any]) -> tuple[Readings, list[Readings]]:
    if not handle.has_value:
        lost: Reading[Any] = Reading(None, handle.reason, handle.unsupported, handle.code)
        return {"state": lost}, []
    readings = {name: run_query(nvml, query, nvml, handle.value) for name, query in GPU_QUERIES}
    # A card that fell off the bus keeps its handle and fails every query with the same code.
    first_loss = next((answer for answer in readings.values() if answer.code == GPU_IS_LOST), None)
    readings["state"] = first_loss if first_loss is not None else succeeded("ok")
    readings["nvlinks"] = _query_nvlinks(nvml, handle.value)
    readings["recovery_action"] = _query_recovery_action(nvml, handle.value)
    mig_mode = readings["mig_mode"].value
    return readings, _query_slices(nvml, handle.value) if mig_mode and mig_mode[0] == 1 else []


def _query_slices(nvml: Any, parent: Any) -> list[Readings]:
    """Return the readings of each MIG slice of a card. Every possible index is tried, because the
    indices may have gaps.
    """
    slices = []
    max_slices = run_query(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, parent).value or 0
    for index in range(max_slices):
        handle = run_query(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, parent, index)
        if handle.has_value:
            slices.append(
                {name: run_query(nvml, query, nvml, handle.value) for name, query in SLICE_QUERIES}
            )
    return slices


def _query_nvlinks(nvml: Any, handle: Any) -> Reading[list[int]]:
    """Return a list with 1 (up) or 0 (down) for each NVLink of the card."""
    states: list[int] = []
    for link in range(MAX_NVLINKS):
        state = run_query(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link)
        if state.value is None:
            return succeeded(states) if states else state
        states.append(int(state.value))
    return succeeded(states)


def _query_recovery_action(nvml: Any, handle: Any) -> Reading[int]:
    """Return the recovery that the driver requests for the card (driver 570 and newer): 0 nothing,
    1 reset, 2 reboot, 3 and 4 drain. checks/health.py lists the meaning of higher numbers.
    """
    answer = run_query(nvml, nvml.nvmlDeviceGetFieldValues, handle, [RECOVERY_ACTION_FIELD])
    if answer.value is None:
        return answer
    field_value = answer.value[0]
    if field_value.nvmlReturn:
        return unsupported("no such field", int(field_value.nvmlReturn))
    return succeeded(int(field_value.value.uiVal))


def _query_peer_access(nvml: Any, handles: list[tuple[int, Any]]) -> Reading[list[list[int]]]:
    """Return ``[i, j, status]`` for each pair of cards. The status 0 means that the two cards can
    read each other's memory.
    """
    if len(handles) < 2:
        return unsupported("fewer than two GPUs")
    pairs = []
    for (i, first_handle), (j, second_handle) in combinations(handles, 2):
        status = run_query(nvml, nvml.nvmlDeviceGetP2PStatus, first_handle, second_handle, 0)
        if status.value is None:
            return status
        pairs.append([i, j, int(status.value)])
    return succeeded(pairs)

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
from toolkit.gpu.reading import Reading, failed, of, unsupported

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

Answers = dict[str, Any]  # field name -> Reading[Any]


@dataclass
class NvmlAnswers:
    """The results of all NVML queries. ``start`` is the version of NVML, or the reason why NVML did
    not start.

    ``gpus`` contains a pair for each card: the readings of the card, and a list with the readings
    of each of its MIG slices. The readings of a card or slice are a mapping from the name of a
    field of ``GpuSnapshot`` to a ``Reading``.
    """

    start: Reading[str]
    driver_version: Reading[str]
    gpus: list[tuple[Answers, list[Answers]]] = field(default_factory=list)
    p2p: Reading[list[list[int]]] = field(
        default_factory=lambda: unsupported("fewer than two GPUs")
    )


def ask(nvml: Any, query: Callable[..., Any], *arguments: Any) -> Reading[Any]:
    """Call ``query`` and return its result as a Reading.

    If the driver does not support the query, the Reading is "not supported"; after any other error
    it is "failed". Newer versions of pynvml raise NVMLLibraryMismatchError if the driver is too old
    for the query. This exception is not a subclass of NVMLError.
    """
    try:
        return of(query(*arguments))
    except nvml.NVMLLibraryMismatchError:
        return unsupported("Function Not Found", 13)
    except nvml.NVMLError as error:
        code = int(error.value)
        kind = unsupported if code in _UNSUPPORTED_CODES else failed
        return kind(str(error), code)
    except UnicodeDecodeError:
        return failed("a result that is not text")


def read(deadline_s: float = DEADLINE_S) -> NvmlAnswers:
    """Return the results of all NVML queries on this node. If the driver does not respond within
    ``deadline_s`` seconds, the results have the reason in ``start``.
    """
    results: list[NvmlAnswers] = []
    worker = threading.Thread(target=lambda: results.append(_read()), name="nvml", daemon=True)
    worker.start()
    worker.join(deadline_s)
    if results:
        return results[0]
    silence: Reading[str] = failed(
        f"NVML did not respond within {deadline_s:g} s"
        if worker.is_alive()
        else "NVML could not be queried"
    )
    return NvmlAnswers(start=silence, driver_version=silence)


def _read() -> NvmlAnswers:
    import pynvml  # noqa: PLC0415 - takes 15 ms, and only these commands need it

    start = ask(pynvml, pynvml.nvmlInit)
    if not start.known:
        return NvmlAnswers(start=start, driver_version=start)
    try:
        answers = NvmlAnswers(
            start=ask(pynvml, pynvml.nvmlSystemGetNVMLVersion),
            driver_version=ask(pynvml, pynvml.nvmlSystemGetDriverVersion),
        )
        count = ask(pynvml, pynvml.nvmlDeviceGetCount)
        if not count.known:
            answers.start = count
            return answers
        handles = [_handle(pynvml, index) for index in range(count.value or 0)]
        answers.gpus = [_gpu(pynvml, handle) for handle in handles]
        known = [(index, one.value) for index, one in enumerate(handles) if one.known]
        answers.p2p = _peers(pynvml, known)
        return answers
    finally:
        ask(pynvml, pynvml.nvmlShutdown)


def _handle(nvml: Any, index: int) -> Reading[Any]:
    return ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)


def _gpu(nvml: Any, handle: Reading[Any]) -> tuple[Answers, list[Answers]]:
    if not handle.known:
        lost: Reading[Any] = Reading(None, handle.reason, handle.unsupported, handle.code)
        return {"state": lost}, []
    row = {name: ask(nvml, query, nvml, handle.value) for name, query in GPU_QUERIES}
    # A card that fell off the bus keeps its handle and fails every query with the same code.
    first_loss = next((answer for answer in row.values() if answer.code == GPU_IS_LOST), None)
    row["state"] = first_loss if first_loss is not None else of("ok")
    row["nvlinks"] = _nvlinks(nvml, handle.value)
    row["recovery_action"] = _recovery_action(nvml, handle.value)
    mig_mode = row["mig_mode"].value
    return row, _slices(nvml, handle.value) if mig_mode and mig_mode[0] == 1 else []


def _slices(nvml: Any, parent: Any) -> list[Answers]:
    """Return the readings of each MIG slice of a card. Every possible index is tried, because the
    indices may have gaps.
    """
    rows = []
    most = ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, parent).value or 0
    for index in range(most):
        handle = ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, parent, index)
        if handle.known:
            rows.append(
                {name: ask(nvml, query, nvml, handle.value) for name, query in SLICE_QUERIES}
            )
    return rows


def _nvlinks(nvml: Any, handle: Any) -> Reading[list[int]]:
    """Return a list with 1 (up) or 0 (down) for each NVLink of the card."""
    states: list[int] = []
    for link in range(MAX_NVLINKS):
        state = ask(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link)
        if state.value is None:
            return of(states) if states else state
        states.append(int(state.value))
    return of(states)


def _recovery_action(nvml: Any, handle: Any) -> Reading[int]:
    """Return the recovery that the driver requests for the card (driver 570 and newer): 0 nothing,
    1 reset, 2 reboot, 3 and 4 drain. checks/health.py lists the meaning of higher numbers.
    """
    answer = ask(nvml, nvml.nvmlDeviceGetFieldValues, handle, [RECOVERY_ACTION_FIELD])
    if answer.value is None:
        return answer
    field_value = answer.value[0]
    if field_value.nvmlReturn:
        return unsupported("no such field", int(field_value.nvmlReturn))
    return of(int(field_value.value.uiVal))


def _peers(nvml: Any, handles: list[tuple[int, Any]]) -> Reading[list[list[int]]]:
    """Return ``[i, j, status]`` for each pair of cards. The status 0 means that the two cards can
    read each other's memory.
    """
    if len(handles) < 2:
        return unsupported("fewer than two GPUs")
    pairs = []
    for (i, one), (j, other) in combinations(handles, 2):
        status = ask(nvml, nvml.nvmlDeviceGetP2PStatus, one, other, 0)
        if status.value is None:
            return status
        pairs.append([i, j, int(status.value)])
    return of(pairs)

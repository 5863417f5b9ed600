"""Copy weights out of memory-mapped files, and end the process with a clear message on a bus error.

safetensors maps a file into memory, and on a CPU the loaders use the mapped memory as tensors. If
the file is truncated or overwritten in place during the run, the process ends with SIGBUS, or the
weights of the model change silently. So tensors are copied out of mapped files. For files that stay
mapped, ``exit_on_bus_errors`` prints one line and ends the process with exit code 2. This module
does not import torch: it uses the methods of the model's own tensors.
"""

from __future__ import annotations

import os
import signal
from bisect import bisect_right
from typing import Any

from toolkit.base.errors import InputError

BUS_ERROR_MESSAGE = (
    "error: part of a file that is mapped into memory no longer exists (SIGBUS): a model or "
    "data file was truncated during the run, or its disk failed; restore the file and start "
    "again: the run resumes from its last checkpoint\n"
)
_MESSAGE_BYTES = BUS_ERROR_MESSAGE.encode()
_kept_handlers: list[Any] = []  # keeps a reference to the C function, which must not be freed


def _exit_on_signal(_number: int) -> None:
    os.write(2, _MESSAGE_BYTES)
    os._exit(InputError.exit_code)


def exit_on_bus_errors() -> None:
    """Make a bus error end this process with one line and exit code 2 from now on. Does nothing if
    this function was called before or if other code handles the signal.
    """
    if _kept_handlers or signal.getsignal(signal.SIGBUS) is not signal.SIG_DFL:
        return
    import ctypes  # noqa: PLC0415 - only a run needs it

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_exit_on_signal)
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(int(signal.SIGBUS), ctypes.cast(handler, ctypes.c_void_p))
    _kept_handlers.append(handler)


_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")


def mapped_weight_files() -> list[tuple[int, int, str]]:
    """``(start, end, path)`` of every weights file that is mapped into this process, sorted; empty
    if the system does not report mappings.
    """
    mapped: list[tuple[int, int, str]] = []
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and _is_weights(fields[5]):
                    start, _, end = fields[0].partition("-")
                    mapped.append((int(start, 16), int(end, 16), fields[5]))
    except OSError:
        return []
    return sorted(mapped)


def _is_weights(path: str) -> bool:
    """Whether a mapped file is a weights file. In the Hugging Face cache, every file in a ``blobs``
    folder counts as one, because the name of a blob is a digest without a suffix.
    """
    mapped_path = path.removesuffix(" (deleted)")
    return mapped_path.startswith("/") and (
        mapped_path.endswith(_WEIGHT_FILES) or "/blobs/" in mapped_path
    )


def copy_mapped_weights(model: Any) -> int:
    """Copy every parameter and buffer of ``model`` that is in a mapped file into separate memory,
    in place; return how many bytes were copied. Tied tensors stay tied.
    """
    maps = mapped_weight_files()
    starts = [start for start, _, _ in maps]
    copied: dict[tuple[int, int], Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != "cpu" or not starts:
            continue
        address = tensor.data_ptr()
        index = bisect_right(starts, address) - 1
        if index < 0 or address >= maps[index][1]:
            continue
        key = (address, tensor.numel())
        if key not in copied:
            copied[key] = tensor.data.clone()
        tensor.data = copied[key].reshape(tensor.shape)
    return sum(tensor.nbytes for tensor in copied.values())

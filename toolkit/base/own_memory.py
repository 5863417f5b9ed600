"""Weights in memory of this process's own, not mapped from the user's files.

safetensors maps a file into memory, and on a CPU loaders keep tensors that lie in the map. A file
that is cut short or written over in place during the run would then end the process (SIGBUS) or
change the base without a word. What is kept is therefore copied out of such maps. torch is not
imported here: a model's tensors are asked themselves.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")


def mapped_files() -> list[tuple[int, int, str]]:
    """``(start, end, path)`` of every file of weights that is mapped into this process, sorted;
    empty where the system does not tell.
    """
    found: list[tuple[int, int, str]] = []
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and _is_weights(fields[5]):
                    start, _, end = fields[0].partition("-")
                    found.append((int(start, 16), int(end, 16), fields[5]))
    except OSError:
        return []
    return sorted(found)


def _is_weights(path: str) -> bool:
    """Whether a mapping is of a file of weights. A hub snapshot links to blobs, whose names are
    digests without a suffix.
    """
    plain = path.removesuffix(" (deleted)")
    return plain.startswith("/") and (plain.endswith(_WEIGHT_FILES) or "/blobs/" in plain)


def own_weights(model: Any) -> int:
    """Copy every parameter and buffer of ``model`` that lies in a mapped file into memory of its
    own, in place; return how many bytes were copied. Tied tensors stay tied.
    """
    maps = mapped_files()
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

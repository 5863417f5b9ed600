"""Read files of weights into the operating system's cache while other modules are imported.

With a cold cache, the first half minute of a start is spent on imports, which need one core and no
disk. After that, the start waits for the disk. The bytes that this module reads stay in the cache,
so the loader of the weights finds them in memory.
"""

from __future__ import annotations

import os
import stat
import threading
from itertools import chain
from pathlib import Path

WEIGHTS_SUFFIX = ".safetensors"
BLOCK_BYTES = 8 << 20
PIECE_BYTES = 256 << 20
MAX_THREADS = 4
MEMORY_SHARE = 0.6
"""The largest part of the available memory that read files may fill. If a checkpoint does not fit,
reading its end removes its beginning from the cache.
"""

_started_folders: set[Path] = set()


class ReadAhead:
    """Threads that read files. The threads end when all files are read. They do not keep the
    process alive.
    """

    def __init__(self, files: list[Path]) -> None:
        self._pieces = list(chain.from_iterable(_split_file(path) for path in files))
        self._lock = threading.Lock()
        self.bytes_read = 0
        self._threads = [
            threading.Thread(target=self._work, name="read-ahead", daemon=True)
            for _ in range(min(MAX_THREADS, len(self._pieces)))
        ]

    def start(self) -> None:
        """Start the threads; return at once."""
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Wait until all files are read."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        buffer = bytearray(BLOCK_BYTES)
        while True:
            with self._lock:
                if not self._pieces:
                    return
                path, start, end = self._pieces.pop(0)
            try:
                self._read(path, start, end, buffer)
            except OSError:
                return  # the loader of the file reports what is wrong with it

    def _read(self, path: Path, start: int, end: int, buffer: bytearray) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while start < end:
                count = os.preadv(handle, [buffer], start)
                if count == 0:
                    return
                start += count
                with self._lock:
                    self.bytes_read += count
        finally:
            os.close(handle)


def read_ahead(folder: str | Path, available_bytes: int) -> ReadAhead | None:
    """Start to read the weights in ``folder``, and return the running ReadAhead. Return None if
    this process already read the folder, if the folder has no weights, or if there is too little
    memory to keep them.
    """
    path = Path(folder)
    if path in _started_folders or not path.is_dir():
        return None
    files = [file for file in sorted(path.glob(f"*{WEIGHTS_SUFFIX}")) if _size_bytes(file)]
    total_bytes = sum(_size_bytes(file) for file in files)
    if not files or total_bytes > MEMORY_SHARE * available_bytes:
        return None
    _started_folders.add(path)
    reader = ReadAhead(files)
    reader.start()
    return reader


def unused_memory_bytes() -> int:
    """The bytes of memory that are completely unused. Memory that the system's file cache uses is
    not included, so the result is smaller than the "available" memory.
    """
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _split_file(path: Path) -> list[tuple[Path, int, int]]:
    size = _size_bytes(path)
    return [(path, start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES)]


def _size_bytes(path: Path) -> int:
    """Size of a regular file in bytes; 0 for anything else."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0

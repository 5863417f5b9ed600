"""Count the bytes that come out of a packed stream (gzip, bzip2, xz), and refuse a decompression
bomb while it is unpacked.
"""

from __future__ import annotations

import io
import lzma
import zlib
from typing import IO, TYPE_CHECKING, Any

from toolkit.base.files import unusable_file_error
from toolkit.base.formatting import MIB, format_bytes

if TYPE_CHECKING:
    from pathlib import Path

MAX_RATIO = 200  # the most unpacked bytes per packed byte
RATIO_FREE_BYTES = 64 * MIB  # below this many unpacked bytes the ratio is not checked
XZ_MEMORY_BYTES = 256 * MIB
READ_BYTES = MIB // 4
FIX_UNPACK_YOURSELF = "unpack the file yourself and check its content"
UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


def max_unpacked_bytes(packed_bytes: int, limit: int) -> int:
    """Return how many bytes may be unpacked from ``packed_bytes`` bytes: ``MAX_RATIO`` times as
    many, but at least ``RATIO_FREE_BYTES``. The result is never above ``limit``.
    """
    return min(max(RATIO_FREE_BYTES, MAX_RATIO * packed_bytes), limit)


def open_decompressor(file: IO[bytes]) -> IO[bytes] | None:
    """Return a stream of the unpacked bytes of ``file``; None if ``file`` is not packed. The first
    bytes show the format.
    """
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        import gzip  # noqa: PLC0415 - only packed files need it

        return gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[return-value]
    if start.startswith(b"BZh"):
        import bz2  # noqa: PLC0415 - only packed files need it

        return bz2.BZ2File(file)
    return _XzDecompressor(file) if start == b"\xfd7zXZ\x00" else None  # type: ignore[return-value]


class _XzDecompressor:
    """Unpack an xz file with a limit on memory, because its header may request gigabytes and lzma's
    own file class has no limit.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)

    def read1(self, count: int) -> bytes:
        while True:
            if self.decoder.eof:
                packed = self.decoder.unused_data.lstrip(b"\0") or self.file.read(
                    io.DEFAULT_BUFFER_SIZE
                )
                if not packed.lstrip(b"\0"):
                    return b""
                self.decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)
            elif self.decoder.needs_input:
                packed = self.file.read(READ_BYTES)
                if not packed:
                    raise EOFError("the file ends before its end marker")
            else:
                packed = b""
            if chunk := self.decoder.decompress(packed, count):
                return chunk


class UnpackedStream(io.RawIOBase):
    """A stream of unpacked bytes. ``source`` is the decompressor that reads the packed bytes from
    ``file``.

    Reading raises InputError if more than ``limit`` bytes are unpacked, or more than ``MAX_RATIO``
    times the packed bytes read so far (small files may exceed this ratio).
    """

    def __init__(self, path: Path, file: IO[bytes], source: Any, limit: int) -> None:
        self.path, self.file, self.source, self.limit = path, file, source, limit
        self.unpacked_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        try:
            chunk = self.source.read1(len(target))
        except UNPACKING_ERRORS as error:
            raise unusable_file_error(self.path, f"cannot be unpacked: {error}") from None
        self.unpacked_bytes += len(chunk)
        max_bytes = max_unpacked_bytes(self.file.tell(), self.limit)
        if self.unpacked_bytes > max_bytes:
            raise unusable_file_error(
                self.path,
                f"unpacks to more than {format_bytes(max_bytes)}",
                fix=FIX_UNPACK_YOURSELF,
            )
        target[: len(chunk)] = chunk
        return len(chunk)

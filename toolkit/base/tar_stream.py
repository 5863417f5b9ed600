"""Read the members of a tar file once, from front to back, with limits.

Python's tarfile has three weaknesses: it reads a header of any size into memory, it follows a
header that points to an earlier position, and it unpacks all data between two headers, however much
it is. To prevent all three, this module makes tarfile read from a ``ForwardOnlyStream`` stream.
"""

from __future__ import annotations

import io
import tarfile
from typing import IO, TYPE_CHECKING

from toolkit.base.decompression import READ_BYTES, UnpackedStream, open_decompressor
from toolkit.base.errors import ConfigError
from toolkit.base.files import unusable_file_error
from toolkit.base.formatting import MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_HEADER_BYTES = MIB  # limit for the headers of one member
MAX_HEADERS_BYTES = 16 * MIB  # limit for the headers of all members


class ForwardOnlyStream:
    """A stream for tarfile. It never moves backwards, and it limits the size of one read."""

    def __init__(self, path: Path, file: IO[bytes], limit: int) -> None:
        self.path = path
        self.position = 0
        self.in_headers = True
        self.headers_bytes = 0
        source = open_decompressor(file)
        self.is_uncompressed = source is None
        self.source: IO[bytes] = file
        if source is not None:
            unpacked = UnpackedStream(path, file, source, limit + MAX_HEADERS_BYTES)
            self.source = io.BufferedReader(unpacked, buffer_size=MIB)

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes:
        """Read a header, or a part of a member's data."""
        if not 0 <= count <= MAX_HEADER_BYTES:
            problem = f"has a header of {count} bytes; the limit is {MAX_HEADER_BYTES}"
            raise ConfigError(problem, where=str(self.path))
        data = self.source.read(count)
        self.position += len(data)
        self.headers_bytes += len(data) if self.in_headers else 0
        if self.headers_bytes > MAX_HEADERS_BYTES:
            limit_text = format_bytes(MAX_HEADERS_BYTES)
            raise ConfigError(f"has headers of more than {limit_text}", where=str(self.path))
        return data

    def seek(self, position: int) -> None:
        if position < self.position:
            raise unusable_file_error(self.path, "has a header that points backwards")
        if self.is_uncompressed:
            self.source.seek(position)
            self.position = position
            return
        while self.position < position:
            data = self.source.read(min(READ_BYTES, position - self.position))
            if not data:
                return
            self.position += len(data)


def tar_members(
    path: Path, file: IO[bytes], limit: int
) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Yield each member with a stream of its content, or with None if it is not a regular file.
    Read the content before requesting the next member. Raises tarfile.TarError, RecursionError,
    InputError or ConfigError.
    """
    stream = ForwardOnlyStream(path, file, limit)
    with tarfile.TarFile(fileobj=stream, mode="r", errorlevel=2) as tar:  # type: ignore[arg-type]
        while (info := tar.next()) is not None:
            stream.in_headers = False
            yield info, tar.extractfile(info) if info.isreg() and not info.issparse() else None
            stream.in_headers = True
            # tarfile would keep all members in this list, which is not needed
            tar.members = []  # type: ignore[attr-defined]

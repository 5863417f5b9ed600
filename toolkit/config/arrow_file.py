"""Find out whether a file is an Arrow file (the IPC file or stream format) from its framing alone,
without pyarrow.

A stream is a sequence of messages. Each message has a mark, the length of the metadata, the
metadata (a flatbuffer; only the length of the body is read from it) and the body. A file is a
stream between two magic numbers.
"""

from __future__ import annotations

import os
import struct
from typing import IO

MAGIC = b"ARROW1"
CONTINUATION = 0xFFFFFFFF
MAX_MESSAGES = 10_000
MAX_METADATA_BYTES = 64 << 20
_BODY_LENGTH = 3  # number of the field bodyLength in Message (Message.fbs)


def arrow_fault(file: IO[bytes]) -> str | None:
    """A message that says what is wrong with the framing; None if the parts that are checked are
    right.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = 0
    if file.read(len(MAGIC)) == MAGIC:
        file.seek(max(size - len(MAGIC), 0))
        if size < 4 * len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
            return "it is cut short: it does not end as an Arrow file does"
        start, size = 8, size - len(MAGIC) - 4
    try:
        return _walk(file, start, size)
    except (struct.error, IndexError, OverflowError):
        return "its metadata cannot be read"


def _walk(file: IO[bytes], at: int, end: int) -> str | None:
    for number in range(MAX_MESSAGES):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            # a stream may end without an end mark
            return "it holds no schema" if number == 0 else None
        mark, length = struct.unpack("<II", head)
        if mark != CONTINUATION:
            return (
                "it does not begin as an Arrow file or stream does"
                if number == 0
                else (f"its message {number + 1} does not begin as one does")
            )
        if length == 0:
            return "it holds no schema" if number == 0 else None
        if length > min(MAX_METADATA_BYTES, end - at):
            return f"its message {number + 1} is longer than the file"
        at += 8 + length + _body_length(file.read(length))
        if at > end:
            return f"it is cut short in its message {number + 1}"
    return None


def _body_length(metadata: bytes) -> int:
    """The length of a message's body. A flatbuffer begins with the position of its table. The table
    begins with the distance back to its list of fields.
    """
    (table,) = struct.unpack_from("<I", metadata, 0)
    (back,) = struct.unpack_from("<i", metadata, table)
    (size,) = struct.unpack_from("<H", metadata, table - back)
    place = 4 + 2 * _BODY_LENGTH
    if place + 2 > size:
        return 0  # a missing field has its default value
    (offset,) = struct.unpack_from("<H", metadata, table - back + place)
    if offset == 0:
        return 0
    (length,) = struct.unpack_from("<q", metadata, table + offset)
    if length < 0:
        raise IndexError
    return int(length)

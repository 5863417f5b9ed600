"""Check without pyarrow whether a file has the framing of an Arrow file (IPC file format or IPC
stream format). The framing is the sequence of message headers. The content of the messages is not
checked.

In the stream format, a file is a sequence of messages. Each message consists of a continuation
mark, the length of the metadata, the metadata (a flatbuffer), and the body. Only the length of the
body is read from the metadata. In the file format, the same sequence is enclosed by two magic
numbers.
"""

from __future__ import annotations

import os
import struct
from typing import IO

MAGIC = b"ARROW1"
CONTINUATION = 0xFFFFFFFF
MAX_MESSAGES = 10_000
MAX_METADATA_BYTES = 64 << 20
_BODY_LENGTH = 3  # the number of the field bodyLength of the table Message (Message.fbs)


def arrow_fault(file: IO[bytes]) -> str | None:
    """Return a text that says what is wrong with the framing of the Arrow file ``file``; None if no
    fault was found.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = 0
    if file.read(len(MAGIC)) == MAGIC:
        file.seek(max(size - len(MAGIC), 0))
        if size < 4 * len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
            return "the file is cut short: it does not end with Arrow's magic number"
        start, size = 8, size - len(MAGIC) - 4
    try:
        return _find_message_fault(file, start, size)
    except (struct.error, IndexError, OverflowError):
        return "the metadata of a message cannot be read"


def _find_message_fault(file: IO[bytes], offset: int, end: int) -> str | None:
    for number in range(MAX_MESSAGES):
        file.seek(offset)
        header = file.read(8)
        if len(header) < 8:
            # a stream may end without an end mark
            return "the file contains no schema" if number == 0 else None
        mark, length = struct.unpack("<II", header)
        if mark != CONTINUATION:
            return (
                "the file does not begin like an Arrow file or stream"
                if number == 0
                else f"message {number + 1} does not begin with the continuation mark"
            )
        if length == 0:
            return "the file contains no schema" if number == 0 else None
        if length > min(MAX_METADATA_BYTES, end - offset):
            return f"message {number + 1} is longer than the file"
        offset += 8 + length + _body_length(file.read(length))
        if offset > end:
            return f"the file is cut short inside message {number + 1}"
    return None


def _body_length(metadata: bytes) -> int:
    """Return the length in bytes of a message's body, as the message's ``metadata`` states it.

    The metadata is a flatbuffer. A flatbuffer begins with the position of its root table. The root
    table begins with its distance to its vtable. The vtable precedes the root table and contains
    the offset of each field.
    """
    (table,) = struct.unpack_from("<I", metadata, 0)
    (vtable_distance,) = struct.unpack_from("<i", metadata, table)
    (vtable_size,) = struct.unpack_from("<H", metadata, table - vtable_distance)
    field_offset = 4 + 2 * _BODY_LENGTH
    if field_offset + 2 > vtable_size:
        return 0  # a missing field has its default value
    (offset,) = struct.unpack_from("<H", metadata, table - vtable_distance + field_offset)
    if offset == 0:
        return 0
    (length,) = struct.unpack_from("<q", metadata, table + offset)
    if length < 0:
        raise IndexError
    return int(length)

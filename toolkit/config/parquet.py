"""The column names of a Parquet file, from its footer only (parquet.thrift, compact protocol),
without pyarrow.
"""

from __future__ import annotations

import os
import struct
from typing import IO, Any

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 16 << 20
_BOOLS = (1, 2)
_BINARY, _LIST, _SET, _STRUCT = 8, 9, 10, 12
_SCHEMA, _NAME, _CHILDREN = 2, 4, 5  # field numbers of FileMetaData and SchemaElement
_DEEPEST = 32


def is_parquet(file: IO[bytes]) -> bool:
    """Whether the file ends like a Parquet file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 4, 0))
    return file.read(4) == MAGIC


def parquet_columns(file: IO[bytes]) -> tuple[str, ...] | None:
    """The top-level columns; None if the file is not a Parquet file."""
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        length, magic = struct.unpack("<I4s", file.read(8))
        if magic != MAGIC or length > min(size, MAX_FOOTER_BYTES):
            return None
        file.seek(size - 8 - length)
        metadata = _Thrift(file.read(length)).struct(0)
        return _top_level(metadata[_SCHEMA])
    except (OSError, struct.error, IndexError, KeyError, TypeError, ValueError):
        return None


def _top_level(elements: list[dict[int, Any]]) -> tuple[str, ...]:
    """The schema is a tree in pre-order, its root first."""
    names: list[str] = []
    index = 1
    for _ in range(elements[0][_CHILDREN]):
        names.append(elements[index][_NAME].decode("utf-8"))
        below = 1
        while below:
            below += elements[index].get(_CHILDREN, 0) - 1
            index += 1
    return tuple(names)


class _Thrift:
    """The part of Thrift's compact protocol that a footer needs."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a varint of more than 64 bits")

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise ValueError("nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self.byte()) != 0:
            delta, kind = head >> 4, head & 0x0F
            number = number + delta if delta else _zigzag(self.varint())
            fields[number] = kind == 1 if kind in _BOOLS else self.value(kind, depth + 1)
        return fields

    def value(self, kind: int, depth: int) -> Any:
        if kind in _BOOLS or kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return _zigzag(self.varint())
        if kind == 7:
            self.at += 8
            return None
        if kind == _BINARY:
            length = self.varint()
            self.at += length
            return self.data[self.at - length : self.at]
        if kind in (_LIST, _SET):
            return self.items(depth)
        if kind == _STRUCT:
            return self.struct(depth)
        raise ValueError(f"a value of kind {kind}")  # a map: footers have none

    def items(self, depth: int) -> list[Any]:
        head = self.byte()
        count, kind = head >> 4, head & 0x0F
        if count == 15:
            count = self.varint()
        if count > len(self.data):
            raise ValueError("a list that is longer than the footer")
        return [self.value(kind, depth + 1) for _ in range(count)]


def _zigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)

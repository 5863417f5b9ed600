"""Read the column names of a Parquet file without pyarrow, and check that the pages of the file are
at the positions that its footer states (parquet.thrift, compact protocol).
"""

from __future__ import annotations

import os
import struct
from typing import IO, Any

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 16 << 20
_BOOL_TYPES = (1, 2)
_BINARY, _LIST, _SET, _STRUCT = 8, 9, 10, 12
_SCHEMA, _NAME, _CHILDREN = 2, 4, 5  # field numbers of FileMetaData and SchemaElement
_MAX_NESTING = 32
_TYPE, _REPETITION, _CONVERTED, _LOGICAL = 1, 3, 6, 10  # field numbers of SchemaElement
_REPEATED = 2
_NUMBER_TYPES = {0: "bool", 1: "int", 2: "int", 4: "float", 5: "float"}
# field numbers of FileMetaData, RowGroup and ColumnChunk
_GROUPS, _COLUMNS, _COLUMN_METADATA = 4, 1, 3
_PATH, _CHUNK_BYTES, _DATA_PAGE, _DICTIONARY_PAGE = 3, 7, 9, 11  # field numbers of ColumnMetaData
_PAGE_BYTES = 3  # field number of PageHeader
_MAX_PAGE_HEADER_BYTES = 1 << 16
MAX_CHUNKS, MAX_PAGES = 2_000, 1_000
_UNREADABLE = (OSError, struct.error, IndexError, KeyError, TypeError, ValueError, AttributeError)


def parquet_columns(file: IO[bytes]) -> tuple[str, ...] | None:
    """Return the names of the top-level columns; None if the file is not a Parquet file."""
    try:
        metadata, _ = _read_footer(file)
        return _top_level_names(metadata[_SCHEMA])
    except _UNREADABLE:
        return None


def number_type(file: IO[bytes], name: str) -> str | None:
    """Return "bool", "int" or "float" if the column ``name`` contains booleans or plain numbers.
    Return None if the column contains other values, or if its type is unknown.
    """
    try:
        metadata, _ = _read_footer(file)
        elements = metadata[_SCHEMA]
        matches = [element for element in elements[1:] if element[_NAME] == name.encode()]
        if len(matches) != 1 or name not in _top_level_names(elements):
            return None
    except _UNREADABLE:
        return None
    is_plain = not {_CHILDREN, _CONVERTED, _LOGICAL} & set(matches[0])
    is_single_value = matches[0].get(_REPETITION) != _REPEATED
    return _NUMBER_TYPES.get(matches[0].get(_TYPE, -1)) if is_plain and is_single_value else None


def parquet_fault(file: IO[bytes]) -> str | None:
    """Return a text that says what is wrong with a Parquet file; None if the footer and the page
    headers are valid. The content of the pages is not checked.
    """
    size = file.seek(0, os.SEEK_END)
    if size < 12:
        return "the file is cut short: even an empty Parquet file has more bytes"
    file.seek(size - 8)
    length, magic = struct.unpack("<I4s", file.read(8))
    if magic != MAGIC:
        return "the file is cut short: it does not end with Parquet's magic number"
    if length > size - 8:  # like Arrow, which does not read the magic number at the beginning
        return f"the footer ({length} bytes) is longer than the file"
    if length > MAX_FOOTER_BYTES:
        return None  # a file with such a large footer is not checked further
    try:
        metadata, end = _read_footer(file)
        _top_level_names(metadata[_SCHEMA])
        columns = [column for group in metadata[_GROUPS] for column in group[_COLUMNS]]
    except _UNREADABLE:
        return "the footer cannot be read"
    for column in columns[:MAX_CHUNKS]:
        chunk_metadata = column.get(_COLUMN_METADATA)
        if chunk_metadata is not None and (fault := _chunk_fault(file, chunk_metadata, end)):
            return fault
    return None


def _read_footer(file: IO[bytes]) -> tuple[dict[int, Any], int]:
    """Return the metadata in the footer, and the offset in the file at which the footer begins.
    Raises ValueError if the file is not a Parquet file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    length, magic = struct.unpack("<I4s", file.read(8))
    if magic != MAGIC or length > min(size, MAX_FOOTER_BYTES):
        raise ValueError("not a Parquet file")
    file.seek(size - 8 - length)
    return _ThriftReader(file.read(length)).read_struct(0), size - 8 - length


def _chunk_fault(file: IO[bytes], metadata: dict[int, Any], footer_start: int) -> str | None:
    """Return a text that says what is wrong with the pages of one column chunk; None if no fault
    was found. ``metadata`` is the metadata of the column chunk, and ``footer_start`` is the offset
    at which the footer begins.
    """
    try:
        name = b".".join(metadata[_PATH]).decode("utf-8", "replace")
    except _UNREADABLE:
        return "the footer cannot be read"
    try:
        starts = [
            metadata[field_number]
            for field_number in (_DATA_PAGE, _DICTIONARY_PAGE)
            if metadata.get(field_number)
        ]
        offset, chunk_end = min(starts), min(starts) + metadata[_CHUNK_BYTES]
        if offset < 4 or chunk_end > footer_start:
            return f"the footer states a position of column {name!r} that is outside the file"
        for _ in range(MAX_PAGES):
            if offset >= chunk_end:
                break
            file.seek(offset)
            reader = _ThriftReader(file.read(min(_MAX_PAGE_HEADER_BYTES, chunk_end - offset)))
            page_bytes = reader.read_struct(0)[_PAGE_BYTES]
            if page_bytes < 0 or offset + reader.offset + page_bytes > chunk_end:
                raise ValueError("longer than its column")
            offset += reader.offset + page_bytes
    except _UNREADABLE:
        return f"a page of column {name!r} cannot be read"
    return None


def _top_level_names(elements: list[dict[int, Any]]) -> tuple[str, ...]:
    """Return the names of the top-level columns. ``elements`` lists the nodes of the schema tree in
    pre-order, beginning with the root.
    """
    names: list[str] = []
    index = 1
    for _ in range(elements[0][_CHILDREN]):
        names.append(elements[index][_NAME].decode("utf-8"))
        remaining_nodes = 1
        while remaining_nodes:
            remaining_nodes += elements[index].get(_CHILDREN, 0) - 1
            index += 1
    return tuple(names)


class _ThriftReader:
    """Reads the part of Thrift's compact protocol that occurs in a footer."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def read_byte(self) -> int:
        self.offset += 1
        return self.data[self.offset - 1]

    def read_varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.read_byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a varint of more than 64 bits")

    def read_struct(self, depth: int) -> dict[int, Any]:
        if depth > _MAX_NESTING:
            raise ValueError("nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while (header := self.read_byte()) != 0:
            delta, kind = header >> 4, header & 0x0F
            number = number + delta if delta else _zigzag(self.read_varint())
            fields[number] = kind == 1 if kind in _BOOL_TYPES else self.read_value(kind, depth + 1)
        return fields

    def read_value(self, kind: int, depth: int) -> Any:
        if kind in _BOOL_TYPES or kind == 3:
            return self.read_byte()
        if kind in (4, 5, 6):
            return _zigzag(self.read_varint())
        if kind == 7:
            self.offset += 8
            return None
        if kind == _BINARY:
            length = self.read_varint()
            self.offset += length
            return self.data[self.offset - length : self.offset]
        if kind in (_LIST, _SET):
            return self.read_list(depth)
        if kind == _STRUCT:
            return self.read_struct(depth)
        raise ValueError(f"a value of kind {kind}")  # a map, which a footer does not contain

    def read_list(self, depth: int) -> list[Any]:
        header = self.read_byte()
        count, kind = header >> 4, header & 0x0F
        if count == 15:
            count = self.read_varint()
        if count > len(self.data):
            raise ValueError("a list that is longer than the footer")
        return [self.read_value(kind, depth + 1) for _ in range(count)]


def _zigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)

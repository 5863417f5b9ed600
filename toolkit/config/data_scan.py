"""Scan the first rows of a JSONL, JSON or CSV file. The scan finds the columns, and the first row
that training would refuse.

The scan and training report a refused row with the same messages, which are defined in
``config.data_types``.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from toolkit.base.data_files import (
    column_names_fault,
    decode_utf8,
    find_nul_key,
    is_valid_unicode,
    parse_chat,
    parse_json_value,
)
from toolkit.config.data_types import (
    EXACT_FLOAT_INTEGERS,
    ColumnType,
    TooDeep,
    TypeMismatch,
    chat_fault,
    prompt_fault,
    too_deep_message,
    type_mismatch_message,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_ROWS = 50_000
MAX_SCAN_BYTES = 4 << 20
_SURROGATE_ESCAPE = "\\ud"
_NUL_ESCAPE = "\\u0000"


@dataclass(frozen=True, slots=True)
class DataSelection:
    """The columns that a run reads from a data file, and the maximum number of rows that it reads
    (None: all rows).
    """

    prompt: str
    answer: str | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Facts of a data file. ``columns`` is None if the column names cannot be read. The counts
    include only the rows that were read.
    """

    path: Path
    columns: tuple[str, ...] | None = None
    rows: int = 0
    empty_prompts: int = 0
    repeated_prompts: int = 0
    missing_answers: int = 0  # rows whose answer is null
    json_chats: int = 0  # prompts that are chats written as JSON text
    is_complete: bool = True  # all rows were read
    problem: str | None = None
    has_message_lists: bool | None = None  # whether the prompts are lists of messages (else texts)
    # the position of the first row that training refuses, and the reason
    refused_row: str | None = None


class Unscanned(Exception):
    """Raised if not even one row can be read within the limit, so that nothing is known about the
    file.
    """


Row = tuple[str, dict[str, Any]]
"""A row: its position in the file as text ("line 3"), and its values by column."""


class _RowChecker:
    """Finds the first row that has an invalid prompt, or a value of another type than the earlier
    values in its column.
    """

    def __init__(self, selection: DataSelection) -> None:
        self.selection, self.remaining_rows = selection, selection.limit
        self.column_types: dict[str, ColumnType] = {}
        self.first_values: dict[str, Any] = {}
        # The first fault, depending on how the prompts are used: as plain text, or as chats that
        # are parsed from JSON text.
        self.text_fault: str | None = None
        self.chat_fault: str | None = None
        self.prompts_are_lists: bool | None = None

    def check(self, place: str, row: dict[str, Any], chat: list[Any] | None) -> None:
        """Check one row. Record its fault if no earlier row has a fault. ``chat`` is the parsed
        chat if the row's prompt is a chat written as JSON text, else None.
        """
        if self.remaining_rows is not None:
            self.remaining_rows -= 1
            if self.remaining_rows < 0:
                return
        fault = self._type_fault(row) or self._prompt_fault(row)
        if fault is not None:
            self.text_fault = self.text_fault or f"{place}: {fault}"
        problem = None if chat is None else chat_fault(chat)
        if problem is not None:
            self.chat_fault = (
                self.chat_fault or f"{place}: column {self.selection.prompt!r} {problem}"
            )

    def _type_fault(self, row: dict[str, Any]) -> str | None:
        for name, value in row.items():
            kind = type(value)
            if value is None:
                continue
            first = self.first_values.setdefault(name, value)
            if kind is type(first) and (
                kind is str or (kind is int and value in EXACT_FLOAT_INTEGERS)
            ):
                continue  # fits; a full check of every value would be slow
            try:
                self._column_type(name, first).add(value)
            except TooDeep:
                return too_deep_message(name)
            except TypeMismatch:
                return type_mismatch_message(name, value, first)
        return None

    def _column_type(self, name: str, first: object) -> ColumnType:
        if name not in self.column_types:
            self.column_types[name] = ColumnType()
            self.column_types[name].add(first)
        return self.column_types[name]

    def _prompt_fault(self, row: dict[str, Any]) -> str | None:
        prompt = row.get(self.selection.prompt)
        if prompt is None:
            return None
        if self.prompts_are_lists is None:
            self.prompts_are_lists = isinstance(prompt, list)
        problem = prompt_fault(prompt, chats=self.prompts_are_lists)
        return None if problem is None else f"column {self.selection.prompt!r} {problem}"


def scan(path: Path, selection: DataSelection, rows: Iterator[Row | None]) -> DataFacts:
    """Read ``rows`` and return their facts. A None in ``rows`` means that the file has further
    rows, which are not read.
    """
    columns: dict[str, None] = {}
    seen_prompts: set[int] = set()
    count = empty = repeated = unanswered = chats = 0
    is_complete, checker = True, _RowChecker(selection)
    has_message_lists: bool | None = None
    for item in rows:
        if item is None or count == MAX_ROWS:
            is_complete = False
            break
        place, row = item
        count += 1
        columns |= dict.fromkeys(row)
        unanswered += selection.answer is not None and row.get(selection.answer) is None
        prompt = row.get(selection.prompt)
        chat = parse_chat(prompt) if isinstance(prompt, str) else None
        checker.check(place, row, chat)
        if prompt is None or (isinstance(prompt, (str, list)) and not _has_text(prompt)):
            empty += selection.prompt in row
            continue
        if has_message_lists is None:
            has_message_lists = isinstance(prompt, list)
        chats += chat is not None
        key = hash(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))
        repeated += key in seen_prompts
        seen_prompts.add(key)
    if count == 0:
        if not is_complete:
            raise Unscanned
        return DataFacts(path, problem="has no rows")
    if fault := column_names_fault(columns):
        return DataFacts(path, problem=fault)
    all_chats = bool(chats) and chats == count - empty
    return DataFacts(
        path,
        tuple(columns),
        count,
        empty,
        repeated,
        unanswered if selection.answer in columns else 0,
        chats,
        is_complete,
        has_message_lists=True if all_chats else has_message_lists,
        refused_row=checker.text_fault or (checker.chat_fault if all_chats else None),
    )


def _has_text(prompt: str | list[Any]) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any(
        bool(message.get("content")) if isinstance(message, dict) else bool(message)
        for message in prompt
    )


def read_rows(file: IO[bytes], path: Path, suffix: str) -> Iterator[Row | None]:
    """Yield the rows of a text file, and None at the end if the file is longer than the limit."""
    if suffix in (".csv", ".tsv"):
        return _csv_rows(file, "\t" if suffix == ".tsv" else ",")
    return _json_rows(file) if suffix == ".json" else _jsonl_rows(file, path)


def _jsonl_rows(file: IO[bytes], path: Path) -> Iterator[Row | None]:
    bytes_read = number = 0
    while raw := file.readline(MAX_SCAN_BYTES + 1):
        number += 1
        bytes_read += len(raw)
        if bytes_read > MAX_SCAN_BYTES:
            yield None
            return
        text = decode_utf8(
            raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, f"{path}:{number}"
        )
        if not text.strip():
            continue
        try:
            row = parse_json_value(text)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {_error_message(error)}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        if _SURROGATE_ESCAPE in text.lower() and not is_valid_unicode(row):
            raise ValueError(f"line {number} contains half of a character (a lone surrogate)")
        if _NUL_ESCAPE in text and (key := find_nul_key(list(row.values()))) is not None:
            raise ValueError(f"line {number}: the key {key!r} contains a NUL character")
        yield f"line {number}", row


def _error_message(error: ValueError) -> str:
    return getattr(error, "msg", str(error))


def _json_rows(file: IO[bytes]) -> Iterator[Row | None]:
    raw = file.read(MAX_SCAN_BYTES + 1)
    if len(raw) > MAX_SCAN_BYTES:
        yield None
        return
    text = raw.decode("utf-8-sig")
    value = parse_json_value(text)
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            'must be a list of objects, or an object {"data": [...]} that contains such a list'
        )
    if not is_valid_unicode(rows):
        raise ValueError("contains half of a character (a lone surrogate)")
    values = [list(row.values()) for row in rows] if _NUL_ESCAPE in text else []
    if (key := find_nul_key(values)) is not None:
        raise ValueError(f"the key {key!r} contains a NUL character")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _csv_rows(file: IO[bytes], delimiter: str) -> Iterator[Row | None]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    cut_marks: list[bool] = []
    # Raise the csv module's limit of 128 KiB per field, because training accepts much longer
    # fields.
    old_limit = csv.field_size_limit(MAX_SCAN_BYTES)
    reader = csv.reader(_limited_lines(text, cut_marks), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if fault := column_names_fault(header):
            raise ValueError(fault)
        for fields in reader:
            if fields and len(fields) != len(header) and not cut_marks:
                problem = f"has {len(fields)} fields, but the header has {len(header)}"
                raise ValueError(f"line {reader.line_num} {problem}")
            if fields:
                yield f"line {reader.line_num}", dict(zip(header, fields, strict=False))
    except csv.Error as error:
        if not cut_marks:
            raise ValueError(f"line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(old_limit)
        text.detach()
    if cut_marks:
        yield None


def _limited_lines(text: io.TextIOWrapper, cut_marks: list[bool]) -> Iterator[str]:
    bytes_read = 0
    while line := text.readline(MAX_SCAN_BYTES + 1):
        bytes_read += len(line)
        if bytes_read > MAX_SCAN_BYTES:
            cut_marks.append(True)
            return
        yield line

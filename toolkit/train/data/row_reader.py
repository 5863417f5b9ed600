"""Read data files as Arrow tables, with the place of each row for error messages.

JSONL and JSON are parsed here, because the errors of pandas and pyarrow have no line number. In all
formats except CSV, values keep their types. In CSV, all values are texts.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from toolkit.base.archives import is_archive, unpack
from toolkit.base.data_files import (
    MAX_JSON_DATA_BYTES,
    column_names_fault,
    data_file_type,
    decode_utf8,
    file_count_message,
    numbered_lines,
    open_data,
    parse_json_value,
    unreadable_table_message,
    unsupported_file_message,
)
from toolkit.base.errors import ConfigError, InputError, ToolkitError, first_line
from toolkit.base.files import MAX_BLANK_LINES, MAX_DATA_BYTES, MAX_LINE_BYTES
from toolkit.base.formatting import format_bytes
from toolkit.config.data_types import type_name
from toolkit.train.data.arrow_columns import (
    ARROW_ERRORS,
    Rows,
    raise_data_error,
    table_from_rows,
    validate_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_ROWS = 50_000_000  # a Parquet file of a few kilobytes can declare any number of equal rows


def read_data_file(path: Path, limit: int | None = None) -> Rows:
    """Return the first ``limit`` rows of a data file. The suffix of the path decides the format.
    The rows are in memory, so the file may change afterwards.

    Raises:
        InputError: the file is missing, unreadable, not a regular file, or invalid. The message has
            the line of an invalid row.
        ConfigError: a column mixes types, or the suffix is unknown.
    """
    if is_archive(path):
        return _read_archive(path, limit)
    kind = data_file_type(path)
    if kind is None:
        problem, fix = unsupported_file_message(path)
        raise ConfigError(problem, where=str(path), fix=fix)
    if not path.exists() and not path.is_symlink():
        raise InputError("the file does not exist", where=str(path), fix=_missing_file_fix(path))
    try:
        with open_data(path, limit=MAX_FILE_BYTES.get(kind.suffix, MAX_DATA_BYTES)) as file:
            return validate_rows(READERS[kind.suffix](file, path, limit), path)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def _read_jsonl(file: IO[bytes], path: Path, limit: int | None) -> Rows:
    rows: list[Any] = []
    lines: list[int] = []
    for number, text in numbered_lines(file, path):
        if limit is not None and len(rows) >= limit:
            break
        if not text.strip():
            continue
        where = f"{path}:{number}"
        row = _parse_json(text, where)
        if not isinstance(row, dict):
            raise_data_error(
                where, f"each line must be a JSON object, but this line is {type_name(row)}"
            )
        rows.append(row)
        lines.append(number)
    return table_from_rows(rows, lambda index: f"{path}:{lines[index]}")


def _read_json(file: IO[bytes], path: Path, limit: int | None) -> Rows:
    raw = file.read(MAX_JSON_DATA_BYTES + 1)
    if len(raw) > MAX_JSON_DATA_BYTES:
        raise_data_error(str(path), f"unpacks to more than {format_bytes(MAX_JSON_DATA_BYTES)}")
    value = _parse_json(decode_utf8(raw.removeprefix(b"\xef\xbb\xbf"), str(path)), str(path))
    if isinstance(value, dict):
        value = value.get("data")
    if not isinstance(value, list):
        raise_data_error(
            str(path),
            'must be a list of JSON objects, or {"data": [...]} with a list of JSON objects',
        )
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            raise_data_error(
                f"{path} row {index + 1}",
                f"each row must be a JSON object, but this row is {type_name(row)}",
            )
    return table_from_rows(value[:limit], lambda index: f"{path} row {index + 1}")


def _read_csv(file: IO[bytes], path: Path, limit: int | None) -> Rows:
    old_limit = csv.field_size_limit(MAX_LINE_BYTES)
    lines: list[int] = []
    rows: list[dict[str, str]] = []
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        reader = csv.reader(
            _bounded_lines(text, path),
            delimiter="\t" if ".tsv" in path.name.lower() else ",",
            strict=True,
        )
        header = next(reader, [])
        if fault := column_names_fault(header):
            raise_data_error(f"{path}:1", fault)
        for fields in reader:
            if limit is not None and len(rows) >= limit:
                break
            if fields and len(fields) != len(header):
                problem = f"has {len(fields)} fields, but the header has {len(header)}"
                raise_data_error(f"{path}:{reader.line_num}", problem)
            if fields:
                rows.append(dict(zip(header, fields, strict=True)))
                lines.append(reader.line_num)
    except csv.Error as error:
        raise_data_error(f"{path}:{reader.line_num}", str(error))
    except UnicodeDecodeError as error:
        raise_data_error(str(path), f"is not UTF-8 text: {error.reason} at byte {error.start}")
    finally:
        csv.field_size_limit(old_limit)
        text.detach()
    return table_from_rows(rows, lambda index: f"{path}:{lines[index]}", header)


def _bounded_lines(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    number = blank_lines = 0
    while line := text.readline(MAX_LINE_BYTES + 1):
        number += 1
        blank_lines += line.isspace()
        if blank_lines > MAX_BLANK_LINES:
            problem = (
                f"more than {MAX_BLANK_LINES} lines are blank: this does not look like a data file"
            )
            raise_data_error(f"{path}:{number}", problem)
        if len(line) > MAX_LINE_BYTES:
            problem = (
                f"a line is longer than {format_bytes(MAX_LINE_BYTES)}: this does not look like a "
                "data file"
            )
            raise_data_error(f"{path}:{number}", problem)
        yield line


def _read_parquet(file: IO[bytes], path: Path, limit: int | None) -> Rows:
    try:
        parquet_file = parquet.ParquetFile(file)
        total_rows, batches = parquet_file.metadata.num_rows, []
        row_count = total_rows if limit is None else min(limit, total_rows)
        if row_count > MAX_ROWS:
            raise_data_error(
                str(path), f"has {total_rows} rows, but at most {MAX_ROWS} rows are supported"
            )
        count = 0
        for batch in parquet_file.iter_batches() if row_count else ():
            batches.append(batch)
            count += len(batch)
            if count >= row_count:
                break
        table = pa.Table.from_batches(batches, schema=parquet_file.schema_arrow)
    except (*ARROW_ERRORS, OSError) as error:
        raise_data_error(str(path), unreadable_table_message("Parquet", first_line(error)))
    return Rows(table.slice(0, limit), lambda index: f"{path} row {index + 1}")


def _read_arrow(file: IO[bytes], path: Path, limit: int | None) -> Rows:
    try:
        try:
            table = pa.ipc.open_stream(file).read_all()
        except pa.ArrowInvalid:
            file.seek(0)
            table = pa.ipc.open_file(file).read_all()
    except (*ARROW_ERRORS, OSError) as error:
        raise_data_error(str(path), unreadable_table_message("Arrow", first_line(error)))
    return Rows(table.slice(0, limit), lambda index: f"{path} row {index + 1}")


READERS: dict[str, Callable[[IO[bytes], Path, int | None], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
MAX_FILE_BYTES = {".json": MAX_JSON_DATA_BYTES}


def _read_archive(path: Path, limit: int | None) -> Rows:
    """Read the only data file in an archive. Messages call the file ``archive/member``. Raises
    ConfigError if the archive contains no data file or several data files.
    """
    with tempfile.TemporaryDirectory(prefix="toolkit-data-") as temporary:
        folder = unpack(path, Path(temporary) / "data")
        files = [
            file
            for file in sorted(folder.rglob("*"))
            if data_file_type(file) is not None and file.is_file()
        ]
        if len(files) != 1:
            raise ConfigError(
                file_count_message(len(files)),
                where=str(path),
                fix="unpack the archive, and use the path of one data file",
            )
        try:
            rows = read_data_file(files[0], limit)
        except ToolkitError as error:
            error.where = (error.where or "").replace(str(folder), str(path))
            raise
        locations = [
            rows.location(i).replace(str(folder), str(path)) for i in range(len(rows.table))
        ]
    return Rows(rows.table, lambda index: locations[index])


def _parse_json(text: str, where: str) -> Any:
    try:
        return parse_json_value(text)
    except json.JSONDecodeError as error:
        location = f"{where}:{error.colno}" if error.lineno == 1 else f"{where}:{error.lineno}"
        raise_data_error(location, f"is not JSON: {error.msg}")
    except RecursionError:
        raise_data_error(where, "is nested too deeply")
    except ValueError as error:
        raise_data_error(where, f"is not JSON: {error}")


def _missing_file_fix(path: Path) -> str | None:
    folder = path.parent
    if not folder.is_dir():
        return f"correct the path, because the folder {folder} does not exist either"
    data_files = sorted(item.name for item in folder.iterdir() if data_file_type(item))
    return f"use a data file in {folder}: {', '.join(data_files[:8])}" if data_files else None

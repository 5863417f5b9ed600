"""Data files as Arrow tables, with the place of every row for messages.

JSONL and JSON are read here and not by pandas or pyarrow, whose errors name no line. Values keep
the types they have in the file; CSV has texts only.
"""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa
from pyarrow import parquet

from toolkit.base.archives import is_archive, unpack
from toolkit.base.errors import ConfigError, InputError, ToolkitError, first_line
from toolkit.train.data_columns import Rows, broken, from_rows, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_FIELD_CHARACTERS = 1 << 27  # of a CSV field; Python's own limit is 131072


def read_file(path: Path, limit: int | None = None) -> Rows:
    """The first ``limit`` rows of a file, by its suffix.

    Raises InputError where the file is missing, unreadable or broken (with the line), ConfigError
    where its columns do not hold one type each, or the suffix is unknown.
    """
    suffix = path.suffix.lower()
    if is_archive(path):
        return _read_archive(path, limit)
    if suffix not in READERS:
        raise ConfigError(
            f"not a kind of data file that is read here: {suffix or 'no suffix'!r}",
            where=str(path),
            fix=f"one of {', '.join(READERS)}, or a folder made by datasets' save_to_disk",
        )
    try:
        return READERS[suffix](path, limit)
    except FileNotFoundError as error:
        raise InputError("there is no such file", where=str(path), fix=_nearest(path)) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def _read_jsonl(path: Path, limit: int | None) -> Rows:
    rows: list[Any] = []
    lines: list[int] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if limit is not None and len(rows) >= limit:
                break
            where = f"{path}:{number}"
            text = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, where)
            if not text.strip():
                continue
            row = _parse(text, where)
            if not isinstance(row, dict):
                broken(where, f"a line must be a JSON object, not {kind_of(row)}")
            rows.append(row)
            lines.append(number)
    return from_rows(rows, lambda index: f"{path}:{lines[index]}")


def _read_json(path: Path, limit: int | None) -> Rows:
    value = _parse(_decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path)), str(path))
    if isinstance(value, dict):
        value = value.get("data")
    if not isinstance(value, list):
        broken(str(path), 'must be a list of objects, or {"data": [...]} with such a list')
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            broken(f"{path} row {index + 1}", f"must be a JSON object, not {kind_of(row)}")
    return from_rows(value[:limit], lambda index: f"{path} row {index + 1}")


def _read_csv(path: Path, limit: int | None) -> Rows:
    old_limit = csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    lines: list[int] = []
    rows: list[dict[str, str]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(
                file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
            )
            header = next(reader, [])
            if len(set(header)) < len(header):
                broken(f"{path}:1", "two columns have the same name")
            for fields in reader:
                if limit is not None and len(rows) >= limit:
                    break
                if fields and len(fields) != len(header):
                    what = f"has {len(fields)} fields where the header has {len(header)}"
                    broken(f"{path}:{reader.line_num}", what)
                if fields:
                    rows.append(dict(zip(header, fields, strict=True)))
                    lines.append(reader.line_num)
    except csv.Error as error:
        broken(f"{path}:{reader.line_num}", str(error))
    except UnicodeDecodeError as error:
        broken(str(path), f"is not UTF-8 text: {error.reason} at byte {error.start}")
    finally:
        csv.field_size_limit(old_limit)
    return from_rows(rows, lambda index: f"{path}:{lines[index]}", header)


def _read_parquet(path: Path, limit: int | None) -> Rows:
    try:
        table = parquet.ParquetFile(path).read()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        broken(str(path), f"is no readable Parquet file: {first_line(error)}")
    return Rows(table.slice(0, limit), lambda index: f"{path} row {index + 1}")


def _read_arrow(path: Path, limit: int | None) -> Rows:
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            try:
                table = pa.ipc.open_file(source).read_all()
            except pa.ArrowInvalid as error:
                broken(str(path), f"is no readable Arrow file: {first_line(error)}")
    return Rows(table.slice(0, limit), lambda index: f"{path} row {index + 1}")


READERS: dict[str, Callable[[Path, int | None], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _read_archive(path: Path, limit: int | None) -> Rows:
    """The one data file in an archive; its name is shown as ``archive/member``."""
    with tempfile.TemporaryDirectory(prefix="toolkit-data-") as temporary:
        folder = unpack(path, Path(temporary) / "data")
        files = [
            file
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in READERS and file.is_file()
        ]
        if len(files) != 1:
            raise ConfigError(
                f"holds {len(files)} data files, not one",
                where=str(path),
                fix="unpack it and name the file",
            )
        try:
            rows = read_file(files[0], limit)
        except ToolkitError as error:
            error.where = (error.where or "").replace(str(folder), str(path))
            raise
        places = [rows.place(i).replace(str(folder), str(path)) for i in range(len(rows.table))]
        # Out of the memory map, which goes with the folder.
        table = pa.Table.from_batches(
            [pa.RecordBatch.from_pylist(rows.table.to_pylist(), schema=rows.table.schema)]
        )
    return Rows(table, lambda index: places[index])


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        at = f"{where}:{error.colno}" if error.lineno == 1 else f"{where}:{error.lineno}"
        broken(at, f"is not JSON: {error.msg}")
    except RecursionError:
        broken(where, "is nested too deeply")
    except ValueError as error:
        broken(where, f"is not JSON: {error}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        broken(where, f"is not UTF-8 text: {error.reason} at byte {error.start}")


def _nearest(path: Path) -> str | None:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    there = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in READERS)
    return f"data files in {folder}: {', '.join(there[:8])}" if there else None

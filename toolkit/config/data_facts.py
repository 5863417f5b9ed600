"""Facts of a data set's files that rules need: its columns, and how many prompts are empty or
repeated.

JSONL, JSON and CSV are read up to a limit. Of Parquet files and saved folders only the columns are
read. Hub data sets are not read.
"""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any

from toolkit.base.data_files import (
    chat_in,
    data_kind,
    decoded,
    is_text,
    names_fault,
    no_kind,
    open_data,
    path_fault,
)
from toolkit.base.errors import InputError, first_line
from toolkit.config.run_paths import ARCHIVES, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from toolkit.config.document import Document

MAX_ROWS = 50_000
MAX_SCAN_BYTES = 4 << 20
NO_DATA = "no data set is set, so there are no prompts to train on"


@dataclass(frozen=True, slots=True)
class DataFacts:
    """``columns`` is None if this kind of data does not give them. Counts cover the rows that were
    read.
    """

    path: Path
    columns: tuple[str, ...] | None = None
    rows: int = 0
    empty: int = 0
    repeated: int = 0
    unanswered: int = 0  # rows whose answer is null
    chats: int = 0  # prompts that are chats written as JSON text
    whole: bool = True  # all rows were read
    problem: str | None = None
    messages: bool | None = None  # whether the prompts are lists of messages (else texts)


class _Unscanned(Exception):
    """Raised when the file is larger than the reading limit, so that nothing is known about it."""


def data_of(document: Document, key: str) -> DataFacts | None:
    """The facts of dataset.path or dataset.eval_path; None if the path does not exist."""
    node = document.node(("dataset", key))
    if node is None or not isinstance(node.value, str):
        return None
    path = resolve(node.value, node)
    if not os.path.lexists(path) or (path.is_symlink() and _leads_nowhere(path)):
        return None
    if fault := path_fault(path):
        return DataFacts(path, problem=fault)
    columns = (_text(document, "prompt") or "prompt", _text(document, "answer"))
    stamp = path.stat()
    split = _text(document, "split") or "train"
    return _read(path, columns, split, (stamp.st_mtime_ns, stamp.st_size))


def _leads_nowhere(path: Path) -> bool:
    """A broken link. Its target may exist on the machine that the run is meant for."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _text(document: Document, key: str) -> str | None:
    node = document.node(("dataset", key))
    return node.value if node is not None and isinstance(node.value, str) else None


@lru_cache(maxsize=64)
def _read(
    path: Path, columns: tuple[str, str | None], split: str, _stamp: tuple[int, int]
) -> DataFacts:
    """``_stamp`` makes the cache forget a file that has changed."""
    try:
        return _facts(path, columns, split)
    except _Unscanned:
        return DataFacts(path, whole=False)
    except InputError as error:
        line = (error.where or "").removeprefix(str(path)).strip(":")
        place = f"line {line}: " if line.isdigit() else ""
        return DataFacts(path, problem=f"{place}{error.message}")
    except UnicodeDecodeError:
        return DataFacts(path, problem="is not UTF-8 text")
    except OSError as error:
        return DataFacts(path, problem=f"cannot be read: {error.strerror or error}")
    except (ValueError, csv.Error, RecursionError) as error:
        return DataFacts(path, problem=first_line(error))


def _facts(path: Path, columns: tuple[str, str | None], split: str) -> DataFacts:
    if path.is_dir():
        return DataFacts(path, _folder_columns(path, split), whole=False)
    if path.name.lower().endswith(ARCHIVES):
        return DataFacts(path, whole=False)
    kind = data_kind(path)
    if kind is None:
        return DataFacts(path, problem=no_kind(path)[0])
    if kind.suffix == ".arrow":
        return DataFacts(path, whole=False)
    with open_data(path) as file:
        if kind.suffix == ".parquet":
            from toolkit.config.parquet import is_parquet, parquet_columns  # noqa: PLC0415 - rarely needed

            names = parquet_columns(file)
            if names is None and not is_parquet(file):
                return DataFacts(path, problem="is not a Parquet file, or is truncated")
            if fault := names_fault(names or ()):
                return DataFacts(path, problem=fault)
            return DataFacts(path, names, whole=False)
        return _scan(path, columns, _rows(file, path, kind.suffix))


def _scan(
    path: Path, names: tuple[str, str | None], rows: Iterator[dict[str, Any] | None]
) -> DataFacts:
    prompt_name, answer_name = names
    columns: dict[str, None] = {}
    seen: set[int] = set()
    count = empty = repeated = unanswered = chats = 0
    whole = True
    messages: bool | None = None
    for row in rows:
        if row is None or count == MAX_ROWS:
            whole = False
            break
        count += 1
        columns |= dict.fromkeys(row)
        unanswered += answer_name is not None and row.get(answer_name) is None
        prompt = row.get(prompt_name)
        if prompt is None or (isinstance(prompt, (str, list)) and not _has_text(prompt)):
            empty += prompt_name in row
            continue
        if messages is None:
            messages = isinstance(prompt, list)
        chats += isinstance(prompt, str) and chat_in(prompt) is not None
        key = hash(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))
        repeated += key in seen
        seen.add(key)
    if count == 0:
        if not whole:
            raise _Unscanned
        return DataFacts(path, problem="has no rows")
    if fault := names_fault(columns):
        return DataFacts(path, problem=fault)
    return DataFacts(
        path,
        tuple(columns),
        count,
        empty,
        repeated,
        unanswered if answer_name in columns else 0,
        chats,
        whole,
        messages=True if chats and chats == count - empty else messages,
    )


def _has_text(prompt: str | list[Any]) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any(
        bool(message.get("content")) if isinstance(message, dict) else bool(message)
        for message in prompt
    )


def _rows(file: IO[bytes], path: Path, suffix: str) -> Iterator[dict[str, Any] | None]:
    """The rows of a text file, then None if the file has more rows than the reading limit."""
    if suffix in (".csv", ".tsv"):
        return _csv_rows(file, "\t" if suffix == ".tsv" else ",")
    return _json_rows(file) if suffix == ".json" else _jsonl_rows(file, path)


def _jsonl_rows(file: IO[bytes], path: Path) -> Iterator[dict[str, Any] | None]:
    taken = number = 0
    while raw := file.readline(MAX_SCAN_BYTES + 1):
        number += 1
        taken += len(raw)
        if taken > MAX_SCAN_BYTES:
            yield None
            return
        text = decoded(
            raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, f"{path}:{number}"
        )
        if not text.strip():
            continue
        try:
            row = _parse(text)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {_reason(error)}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        if _HALF in text.lower() and not is_text(row):
            raise ValueError(f"line {number} contains half of a character (a lone surrogate)")
        yield row


_HALF = "\\ud"


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _reason(error: ValueError) -> str:
    return getattr(error, "msg", str(error))


def _json_rows(file: IO[bytes]) -> Iterator[dict[str, Any] | None]:
    raw = file.read(MAX_SCAN_BYTES + 1)
    if len(raw) > MAX_SCAN_BYTES:
        yield None
        return
    value = _parse(raw.decode("utf-8-sig"))
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError('must be a list of objects, or {"data": [...]} with such a list')
    if not is_text(rows):
        raise ValueError("contains half of a character (a lone surrogate)")
    yield from rows


def _csv_rows(file: IO[bytes], delimiter: str) -> Iterator[dict[str, Any] | None]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    cut: list[bool] = []
    reader = csv.reader(_bounded(text, cut), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if fault := names_fault(header):
            raise ValueError(fault)
        for fields in reader:
            if fields and len(fields) != len(header) and not cut:
                what = f"has {len(fields)} fields, but the header has {len(header)}"
                raise ValueError(f"line {reader.line_num} {what}")
            if fields:
                yield dict(zip(header, fields, strict=False))
    except csv.Error:
        if not cut:
            raise
    finally:
        text.detach()
    if cut:
        yield None


def _bounded(text: io.TextIOWrapper, cut: list[bool]) -> Iterator[str]:
    taken = 0
    while line := text.readline(MAX_SCAN_BYTES + 1):
        taken += len(line)
        if taken > MAX_SCAN_BYTES:
            cut.append(True)
            return
        yield line


def _folder_columns(folder: Path, split: str) -> tuple[str, ...] | None:
    """The columns of a folder that datasets' save_to_disk wrote."""
    from toolkit.config.model_facts import read_json  # noqa: PLC0415 - rarely needed

    if (folder / "dataset_dict.json").is_file():
        name = split.partition("[")[0]
        told = read_json(folder / "dataset_dict.json")
        splits = told.get("splits") if isinstance(told, dict) else None
        if not isinstance(splits, list) or name not in splits:
            return None
        folder = folder / name
    info = read_json(folder / "dataset_info.json")
    features = info.get("features") if isinstance(info, dict) else None
    return tuple(features) if isinstance(features, dict) else None

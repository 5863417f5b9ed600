"""What a data set's own files say that rules need: its columns, and how many prompts are empty or
repeated.

JSONL, JSON and CSV are read up to a bound; of Parquet files and saved folders only the columns
are told. A hub data set is not looked into.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import first_line
from toolkit.config.paths import exists, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from toolkit.config.document import Document

MAX_ROWS = 50_000
MAX_SCAN_BYTES = 4 << 20
NO_DATA = "there is no data set: there are no prompts to train on"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class DataFacts:
    """``columns`` None: not told by this kind. Counts are over the rows that were looked at."""

    path: Path
    columns: tuple[str, ...] | None = None
    rows: int = 0
    empty: int = 0
    repeated: int = 0
    whole: bool = True  # all rows were looked at
    problem: str | None = None
    messages: bool | None = None  # the prompts are lists of messages (else texts)


def data_of(document: Document, key: str) -> DataFacts | None:
    """The facts of dataset.path or dataset.eval_path; None when nothing is there."""
    node = document.node(("dataset", key))
    if node is None or not isinstance(node.value, str):
        return None
    path = resolve(node.value, node)
    if not exists(path):
        return None
    prompt = document.node(("dataset", "prompt"))
    column = prompt.value if prompt is not None and isinstance(prompt.value, str) else "prompt"
    split = document.node(("dataset", "split"))
    name = split.value if split is not None and isinstance(split.value, str) else "train"
    stamp = path.stat()
    return _read(path, column, name, (stamp.st_mtime_ns, stamp.st_size))


@lru_cache(maxsize=64)
def _read(path: Path, column: str, split: str, _stamp: tuple[int, int]) -> DataFacts:
    """``_stamp`` makes the cache forget a file that has changed."""
    if path.is_dir():
        return DataFacts(path, _folder_columns(path, split))
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from toolkit.config.parquet import parquet_columns  # noqa: PLC0415 - rarely needed

        return DataFacts(path, parquet_columns(path))
    if suffix not in SUFFIXES:
        return DataFacts(path)
    try:
        return _scan(path, column, _rows(path, suffix))
    except UnicodeDecodeError:
        return DataFacts(path, problem="is not UTF-8 text")
    except OSError as error:
        return DataFacts(path, problem=f"cannot be read: {error.strerror or error}")
    except (ValueError, csv.Error, RecursionError) as error:
        return DataFacts(path, problem=first_line(error))


def _scan(path: Path, column: str, rows: Iterator[dict[str, Any]]) -> DataFacts:
    columns: dict[str, None] = {}
    seen: set[int] = set()
    count = empty = repeated = 0
    messages: bool | None = None
    for row in islice(rows, MAX_ROWS):
        count += 1
        columns |= dict.fromkeys(row)
        prompt = row.get(column)
        if prompt is None or (isinstance(prompt, (str, list)) and not _has_text(prompt)):
            empty += column in row
            continue
        if messages is None:
            messages = isinstance(prompt, list)
        key = hash(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))
        repeated += key in seen
        seen.add(key)
    if count == 0:
        return DataFacts(path, problem="has no rows")
    whole = next(rows, None) is None and path.stat().st_size <= MAX_SCAN_BYTES
    return DataFacts(path, tuple(columns), count, empty, repeated, whole, messages=messages)


def _has_text(prompt: str | list[Any]) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any(
        bool(message.get("content")) if isinstance(message, dict) else bool(message)
        for message in prompt
    )


def _rows(path: Path, suffix: str) -> Iterator[dict[str, Any]]:
    if suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".json":
        yield from _json_rows(path)
    else:
        yield from _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    taken = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            taken += len(raw)
            if taken > MAX_SCAN_BYTES:
                return
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON: {_reason(error)}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not a JSON object")
                yield row


def _reason(error: ValueError) -> str:
    return getattr(error, "msg", str(error))


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.stat().st_size > MAX_SCAN_BYTES:
        return
    value = json.loads(path.read_bytes().decode("utf-8-sig"))
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError('is no list of objects, and no {"data": [...]} with such a list')
    yield from rows


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_bounded(file), delimiter=delimiter, strict=True)
        header = next(reader, [])
        for fields in reader:
            if fields:
                yield dict(zip(header, fields, strict=False))


def _bounded(lines: Iterator[str]) -> Iterator[str]:
    taken = 0
    for line in lines:
        taken += len(line)
        if taken > MAX_SCAN_BYTES:
            return
        yield line


def _folder_columns(folder: Path, split: str) -> tuple[str, ...] | None:
    """The columns of a folder that datasets' save_to_disk made."""
    from toolkit.config.model_facts import read_json  # noqa: PLC0415 - rarely needed

    if (folder / "dataset_dict.json").is_file():
        name = split.partition("[")[0]
        splits = (read_json(folder / "dataset_dict.json") or {}).get("splits") or []
        if name not in splits:
            return None
        folder = folder / name
    info = read_json(folder / "dataset_info.json")
    features = info.get("features") if isinstance(info, dict) else None
    return tuple(features) if isinstance(features, dict) else None

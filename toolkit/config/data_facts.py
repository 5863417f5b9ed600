"""Read the facts that the rules check from the files of a dataset: its columns, and how many
prompts are empty or repeated.

JSONL, JSON and CSV files are read up to a limit. From Parquet files and saved folders, only the
column names are read. Datasets on the hub are not read.
"""

from __future__ import annotations

import csv
import os
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from toolkit.base.data_files import (
    column_names_fault,
    data_file_type,
    file_count_message,
    open_data,
    path_fault,
    unreadable_table_message,
    unsupported_file_message,
)
from toolkit.base.decompression import RATIO_FREE_BYTES, READ_BYTES
from toolkit.base.errors import ToolkitError, first_line
from toolkit.config.data_scan import DataFacts, DataSelection, Unscanned, read_rows, scan
from toolkit.config.data_types import prompt_type_message
from toolkit.config.run_paths import ARCHIVES, resolve_path

__all__ = ["NO_DATA", "DataFacts", "read_data_facts"]

if TYPE_CHECKING:
    from toolkit.config.document import Document

MAX_LISTING_BYTES = 64 << 20
"""The maximum number of bytes that are unpacked to list the files in an archive."""
NO_DATA = "the run file names no dataset, so there are no prompts to train on"


def read_data_facts(document: Document, key: str) -> DataFacts | None:
    """Return the facts of the dataset at ``dataset.path`` (``key`` is "path") or
    ``dataset.eval_path`` (``key`` is "eval_path"). Return None if the key is not set or its path
    does not exist.
    """
    node = document.find_node(("dataset", key))
    if node is None or not isinstance(node.value, str):
        return None
    path = resolve_path(node.value, node)
    if not os.path.lexists(path) or (path.is_symlink() and _is_dangling_link(path)):
        return None
    if fault := path_fault(path):
        return DataFacts(path, problem=fault)
    selection = DataSelection(
        prompt=_text_setting(document, "prompt") or "prompt",
        answer=_text_setting(document, "answer"),
        limit=_row_limit(document, "limit" if key == "path" else "eval_limit"),
    )
    status = path.stat()
    split = _text_setting(document, "split") or "train"
    return _read(path, selection, split, (status.st_mtime_ns, status.st_size))


def _row_limit(document: Document, key: str) -> int | None:
    node = document.find_node(("dataset", key))
    return node.value if node is not None and type(node.value) is int else None


def _is_dangling_link(path: Path) -> bool:
    """Whether a path is a symbolic link whose target does not exist on this machine. Such a link is
    not an error, because its target may exist on the machine that trains.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _text_setting(document: Document, key: str) -> str | None:
    node = document.find_node(("dataset", key))
    return node.value if node is not None and isinstance(node.value, str) else None


@lru_cache(maxsize=64)
def _read(path: Path, selection: DataSelection, split: str, _stamp: tuple[int, int]) -> DataFacts:
    """Return the facts of the data file or saved folder at ``path``. The result is cached.
    ``_stamp`` is the time of the last change and the size of the file. It is part of the cache key,
    so that a changed file is read again.
    """
    try:
        return _read_facts(path, selection, split)
    except Unscanned:
        return DataFacts(path, is_complete=False)
    except ToolkitError as error:
        line = (error.where or "").removeprefix(str(path)).strip(":")
        place = f"line {line}: " if line.isdigit() else ""
        return DataFacts(path, problem=f"{place}{error.message}")
    except UnicodeDecodeError:
        return DataFacts(path, problem="is not UTF-8 text")
    except OSError as error:
        return DataFacts(path, problem=f"cannot be read: {error.strerror or error}")
    except (ValueError, csv.Error, RecursionError) as error:
        return DataFacts(path, problem=first_line(error))


def _read_facts(path: Path, selection: DataSelection, split: str) -> DataFacts:
    if path.is_dir():
        return DataFacts(path, _folder_columns(path, split), is_complete=False)
    if path.name.lower().endswith(ARCHIVES):
        return _archive_facts(path)
    kind = data_file_type(path)
    if kind is None:
        return DataFacts(path, problem=unsupported_file_message(path)[0])
    with open_data(path) as file:
        if kind.suffix == ".arrow":
            from toolkit.config.arrow_file import arrow_fault  # noqa: PLC0415 - only Arrow files need it

            fault = arrow_fault(file)
            problem = fault and unreadable_table_message("Arrow", fault)
            return DataFacts(path, is_complete=False, problem=problem)
        if kind.suffix == ".parquet":
            return _parquet_facts(file, path, selection)
        facts = scan(path, selection, read_rows(file, path, kind.suffix))
        if kind.packed and not facts.is_complete:
            _check_decompression_bomb(file)
        return facts


def _parquet_facts(file: IO[bytes], path: Path, selection: DataSelection) -> DataFacts:
    from toolkit.config.parquet import number_type, parquet_columns, parquet_fault  # noqa: PLC0415 - only Parquet files need it

    if fault := parquet_fault(file):
        return DataFacts(path, problem=unreadable_table_message("Parquet", fault))
    names = parquet_columns(file)
    prompt_type = number_type(file, selection.prompt)
    prompt_problem = (
        prompt_type and f"column {selection.prompt!r} {prompt_type_message(prompt_type)}"
    )
    return DataFacts(
        path,
        names,
        is_complete=False,
        problem=column_names_fault(names or ()),
        refused_row=prompt_problem,
    )


def _archive_facts(path: Path) -> DataFacts:
    from toolkit.base.archives import list_files  # noqa: PLC0415 - only archives need it

    names = list_files(path, max_bytes_read=MAX_LISTING_BYTES)
    count = 1 if names is None else sum(data_file_type(Path(name)) is not None for name in names)
    return DataFacts(
        path, is_complete=False, problem=None if count == 1 else file_count_message(count)
    )


def _check_decompression_bomb(file: IO[bytes]) -> None:
    """Check that a compressed file, of which a scan read only the first rows, is not a
    decompression bomb. The reader of the file notices a bomb only after more than
    ``RATIO_FREE_BYTES`` unpacked bytes. So this function continues to read until there are more.

    Raises:
        InputError: the file is a decompression bomb.
    """
    remaining_bytes = RATIO_FREE_BYTES + 2 * READ_BYTES
    while remaining_bytes > 0 and (chunk := file.read(READ_BYTES)):
        remaining_bytes -= len(chunk)


def _folder_columns(folder: Path, split: str) -> tuple[str, ...] | None:
    """Return the column names of a dataset that ``save_to_disk`` of the datasets library wrote to
    ``folder``; None if they are unknown.
    """
    from toolkit.config.model_facts import read_json  # noqa: PLC0415 - only saved folders need it

    if (folder / "dataset_dict.json").is_file():
        name = split.partition("[")[0]
        dataset_dict = read_json(folder / "dataset_dict.json")
        splits = dataset_dict.get("splits") if isinstance(dataset_dict, dict) else None
        if not isinstance(splits, list) or name not in splits:
            return None
        folder = folder / name
    info = read_json(folder / "dataset_info.json")
    features = info.get("features") if isinstance(info, dict) else None
    return tuple(features) if isinstance(features, dict) else None

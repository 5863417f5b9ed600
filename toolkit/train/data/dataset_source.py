"""Load the rows of a dataset from a file, a folder written by ``datasets``, or the hub, and
compute a digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from toolkit.base.data_files import data_file_type, path_fault
from toolkit.base.errors import ConfigError, InputError, RetryError, first_line
from toolkit.base.files import (
    FIX_REGULAR_FILE,
    MAX_DATA_BYTES,
    check_folder,
    open_bytes,
    open_regular,
    read_json_object,
    unusable_file_error,
)
from toolkit.base.paths import safe_join
from toolkit.config.run_paths import is_path_only
from toolkit.train.data.arrow_columns import ARROW_ERRORS, Rows, copy_to_memory, validate_rows
from toolkit.train.data.row_reader import read_data_file

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK_BYTES = 1 << 20


def read_source(
    path: str, *, split: str, name: str | None, revision: str | None, limit: int | None
) -> tuple[Rows, str]:
    """Return the first ``limit`` rows of the dataset at ``path``, and its digest for the run's
    manifest.

    The digest ``sha256:...`` is computed from the bytes of the file, or from the bytes of the data
    files in a saved folder. For data from the hub, it is computed from the rows.

    Raises:
        InputError: a file cannot be read, or changed while it was read.
        ConfigError: the dataset or the split does not exist.
        RetryError: the hub does not answer.
    """
    local = Path(path).expanduser()
    if fault := path_fault(local) if os.path.lexists(local) else None:
        raise unusable_file_error(path, fault, fix=FIX_REGULAR_FILE)
    if local.is_dir():
        return _read_folder(local, split, limit)
    if local.exists() or is_path_only(path):
        if split != "train":
            raise ConfigError(
                f"is a single file without splits, but the run file sets the split {split!r}",
                where=path,
                fix="remove the split from the run file. Set `dataset.eval_path` to the file with "
                "the held-out prompts",
            )
        identities = _file_identities([local])
        rows = read_data_file(local, limit)
        return rows, _digest_files([local], identities)
    return _read_hub(path, split, name, revision, limit)


def _read_folder(folder: Path, split: str, limit: int | None) -> tuple[Rows, str]:
    if (folder / "dataset_dict.json").is_file():
        splits = _read_list(folder / "dataset_dict.json", "splits")
        if split not in splits:
            raise ConfigError(
                f"has no split {split!r}",
                where=str(folder),
                fix=f"set `dataset.split` to one of {', '.join(map(str, splits))}",
            )
        folder = safe_join(folder, split, what="a split")
    if not (folder / "state.json").is_file():
        data_files = sorted(item.name for item in folder.iterdir() if data_file_type(item))
        raise ConfigError(
            "is not a folder that `save_to_disk` of the datasets library wrote",
            where=str(folder),
            fix=f"use a file in this folder: {', '.join(data_files[:8])}" if data_files else None,
        )
    files = [
        _data_file_path(folder, entry) for entry in _read_list(folder / "state.json", "_data_files")
    ]
    check_folder(folder)
    for file in files:
        with open_regular(file, limit=MAX_DATA_BYTES):
            pass
    identities = _file_identities(files)
    try:
        dataset = datasets.load_from_disk(str(folder))
        table = _read_rows(dataset, limit)
    except (*ARROW_ERRORS, OSError, AttributeError) as error:
        raise InputError(
            f"the saved dataset cannot be read: {first_line(error)}", where=str(folder)
        ) from error
    rows = validate_rows(Rows(table, lambda index: f"{folder} row {index + 1}"), folder)
    return rows, _digest_files(files, identities)


def _read_list(path: Path, key: str) -> list[Any]:
    value = read_json_object(path).get(key) or []
    if not isinstance(value, list):
        raise unusable_file_error(path, f"has no list of {key}")
    return value


def _data_file_path(folder: Path, entry: object) -> Path:
    """Return the path of a data file that state.json lists as ``entry``. Raises an error if the
    file is not inside ``folder``.
    """
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise InputError("does not name a data file", where=str(folder / "state.json"))
    return safe_join(folder, name, what="a data file in state.json")


def _read_hub(
    path: str, split: str, name: str | None, revision: str | None, limit: int | None
) -> tuple[Rows, str]:
    """Load a dataset from the hub or the hub cache, and return its rows and their digest. Code of
    the dataset is not run, because version 4 of the datasets library removed this feature.
    """
    try:
        dataset = datasets.load_dataset(path, name=name, split=split, revision=revision)
    except ConnectionError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        error_type = ConfigError if offline else RetryError
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub does not answer"
        raise error_type(
            (
                f"dataset {path!r} was not found: this machine has no such file or folder, the hub "
                f"cache does not contain it, and {reason}"
            ),
            fix="use a path that starts with `./` or `/` for a file. Download a hub dataset on a "
            "machine with network access, save it with `save_to_disk`, and use the path of the "
            "saved folder",
        ) from error
    except FileNotFoundError as error:  # DatasetNotFoundError is a FileNotFoundError
        raise ConfigError(
            f"dataset {path!r} was not found: this machine has no such file or folder, and this "
            f"account cannot read a hub dataset with this name ({first_line(error)})",
        ) from error
    except (ValueError, RuntimeError, OSError) as error:  # unknown config or split, or a script
        raise ConfigError(f"dataset {path!r}: {first_line(error)}") from error
    table = _read_rows(dataset, limit)
    rows = validate_rows(Rows(table, lambda index: f"{path} row {index + 1}"), Path(path))
    return rows, _digest_rows(table)


def _read_rows(dataset: Any, limit: int | None) -> pa.Table:
    """Return the first ``limit`` rows as a copy in memory. Without a copy, ``datasets`` would
    memory-map the data files, and these files may change during the run.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    return copy_to_memory(dataset.with_format("arrow")[:count])


def _file_identities(paths: list[Path]) -> list[tuple[int, int, int]]:
    """Return (inode, size, modification time) of each file that exists. A later call shows whether
    a file has changed.
    """
    identities = []
    for path in sorted(paths):
        with contextlib.suppress(OSError):
            status = path.stat()
            identities.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return identities


def _digest_files(paths: list[Path], identities: list[tuple[int, int, int]]) -> str:
    """Return the SHA-256 of the bytes of the files, in the order of their paths. ``identities`` is
    what ``_file_identities`` returned before the files were read. Raises InputError if a file has
    changed since then.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open_bytes(path, limit=MAX_DATA_BYTES) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    if _file_identities(paths) != identities:
        raise InputError(
            "the data changed while it was read",
            where=", ".join(str(path) for path in paths[:3]),
            fix="wait until no process writes to these files, and start the run again",
        )
    return f"sha256:{digest.hexdigest()}"


def _digest_rows(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for row in table.to_pylist():
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return f"sha256:{digest.hexdigest()}"

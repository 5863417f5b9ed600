"""Read a user's file: a regular file of limited size, in limited time. All code of the toolkit
reads such files with this module.

A path in a run file, a model's folder or an archive may lead to a pipe without a writer, an endless
device, a loop of links, or a file that is far too large. In each case this module raises
``InputError`` with the same message in every command.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from toolkit.base.errors import InputError
from toolkit.base.formatting import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_JSON_BYTES = 64 * MIB  # limit for config.json, the index of weights, a tokenizer's settings
MAX_ADAPTER_BYTES = 16 * GIB
MAX_DATA_BYTES = 64 * GIB
MAX_LINE_BYTES = 256 * MIB  # limit for one row of a data file
MAX_BLANK_LINES = 1_000_000
MAX_FOLDER_FILES = 20_000
FIX_GET_AGAIN = "get the file again: it is truncated, or its content does not match its name"
FIX_REGULAR_FILE = "put a regular file at this path"
_FILE_TYPES = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_CHUNK_BYTES = 1 << 20


def unusable_file_error(
    path: str | Path, what: str, *, fix: str | None = FIX_GET_AGAIN
) -> InputError:
    """The error for a file that cannot be used. Every command uses this wording."""
    return InputError(f"the file {what}", where=str(path), fix=fix)


def file_type_fault(mode: int) -> str | None:
    """Return why a file with this mode (``st_mode``) is refused; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return f"is {_FILE_TYPES.get(stat.S_IFMT(mode), 'something else')}, not a regular file"


def open_fault(error: OSError | ValueError) -> str:
    """Return a short text that says why a file cannot be opened."""
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "cannot be opened: the symbolic links of its path form a loop"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"cannot be opened: {reason}"


@contextmanager
def open_regular(path: str | Path, *, limit: int | None = None) -> Iterator[tuple[int, int]]:
    """Open a regular file of at most ``limit`` bytes, and yield ``(descriptor, size in bytes)``.

    Opening never blocks. Raises InputError if the file cannot be opened, is not a regular file, or
    is larger.
    """
    descriptor = -1
    try:
        # O_NONBLOCK: opening a pipe without a writer would otherwise block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(descriptor)
    except (OSError, ValueError) as error:
        if descriptor >= 0:
            os.close(descriptor)
        raise unusable_file_error(path, open_fault(error), fix=None) from error
    try:
        if fault := file_type_fault(status.st_mode):
            raise unusable_file_error(path, fault, fix=FIX_REGULAR_FILE)
        if limit is not None and status.st_size > limit:
            raise unusable_file_error(path, f"has {status.st_size} bytes; the limit is {limit}")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


@contextmanager
def open_bytes(path: str | Path, *, limit: int | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file of at most ``limit`` bytes as a binary file. Raises InputError."""
    with (
        open_regular(path, limit=limit) as (descriptor, _),
        open(descriptor, "rb", closefd=False) as file,
    ):
        yield file


def read_bytes(path: str | Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises InputError."""
    with open_regular(path, limit=limit) as (descriptor, size):
        return read_exactly(descriptor, size, path)


def read_exactly(descriptor: int, count: int, path: str | Path) -> bytes:
    """The next ``count`` bytes, or fewer at the end of the file. Raises InputError."""
    chunks: list[bytes] = []
    try:
        while count and (chunk := os.read(descriptor, min(count, _CHUNK_BYTES))):
            chunks.append(chunk)
            count -= len(chunk)
    except OSError as error:
        raise unusable_file_error(path, f"cannot be read: {error.strerror}", fix=None) from error
    return b"".join(chunks)


def read_text(path: str | Path, *, limit: int = MAX_JSON_BYTES) -> str:
    """A UTF-8 text without its byte-order mark. Raises InputError."""
    try:
        return read_bytes(path, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise unusable_file_error(
            path, f"is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None


def read_json(path: str | Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the value in a JSON file of at most ``limit`` bytes. Raises InputError if the file is
    too large or not valid JSON.
    """
    return parse_json(read_bytes(path, limit=limit), path)


def read_json_object(path: str | Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file. Raises InputError if the file contains anything else."""
    value = read_json(path, limit=limit)
    if not isinstance(value, dict):
        raise unusable_file_error(path, "is not a JSON object")
    return value


def parse_json(raw: bytes, path: str | Path) -> Any:
    """Parse JSON bytes. Raises InputError for duplicate keys, too deep nesting, NaN, numbers of
    thousands of digits and undecodable bytes.
    """
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_reject_duplicate_keys,
            parse_constant=_reject_constant,
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise unusable_file_error(path, f"cannot be read as JSON: {reason}") from None


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"a mapping has the key {key[:80]!r} twice")
        result[key] = value
    return result


def _reject_constant(name: str) -> Any:
    raise ValueError(f"it contains {name}, which is not a JSON number")


def read_lines(
    file: IO[bytes], path: str | Path, *, longest: int = MAX_LINE_BYTES
) -> Iterator[bytes]:
    """Yield the lines of a binary file. A line of more than ``longest`` bytes raises InputError
    before it is read completely.
    """
    number = blank = 0
    while line := file.readline(longest + 1):
        number += 1
        blank += line in (b"\n", b"\r\n")
        if blank > MAX_BLANK_LINES:
            what = f"more than {MAX_BLANK_LINES} lines are blank: this is not a data file"
            raise InputError(what, where=f"{path}:{number}")
        if len(line) > longest:
            raise InputError(
                f"a line is longer than {format_bytes(longest)}: this is not a data file",
                where=f"{path}:{number}",
            )
        yield line


def irregular_files(folder: str | Path) -> Iterator[tuple[str, str]]:
    """Yield ``(name, what is wrong)`` for every entry of a folder that could block a library that
    opens it: pipes, devices, sockets, loops of links.

    Folders are skipped, and so are broken links, which libraries treat as missing files. Raises
    InputError if the folder cannot be listed or has too many files.
    """
    try:
        with os.scandir(folder) as entries:
            sorted_entries = sorted(
                islice(entries, MAX_FOLDER_FILES + 1), key=lambda entry: entry.name
            )
    except OSError as error:
        raise InputError(
            f"the folder cannot be read: {error.strerror}", where=str(folder)
        ) from error
    if len(sorted_entries) > MAX_FOLDER_FILES:
        raise InputError(f"the folder has more than {MAX_FOLDER_FILES} files", where=str(folder))
    for entry in sorted_entries:
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if error.errno == errno.ELOOP:
                yield entry.name, open_fault(error)
            continue
        fault = file_type_fault(mode)
        if fault and not stat.S_ISDIR(mode):
            yield entry.name, fault


def check_folder(folder: str | Path) -> None:
    """Check a folder before a library reads it. Raises InputError if ``irregular_files`` yields an
    entry.
    """
    for name, fault in irregular_files(folder):
        raise unusable_file_error(Path(folder) / name, fault, fix=FIX_REGULAR_FILE)

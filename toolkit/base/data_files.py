"""Recognise data files and read their bytes. The validator and training use the same functions.

The suffix gives the type of a file. A text file with an additional ``.gz`` is unpacked while it is
read, with a limit on the unpacked size.
"""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from toolkit.base.decompression import UnpackedStream
from toolkit.base.errors import InputError
from toolkit.base.files import MAX_DATA_BYTES, file_type_fault, open_bytes, open_fault, read_lines
from toolkit.base.formatting import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", ".arrow")
GZIP_SUFFIX = ".gz"
FILE_SUFFIXES = (
    *TEXT_SUFFIXES,
    *TABLE_SUFFIXES,
    *(f"{text}{GZIP_SUFFIX}" for text in TEXT_SUFFIXES),
)
MAX_COLUMNS = 2_000
MAX_JSON_DATA_BYTES = GIB  # limit for a .json file, which is read as a whole
UNPACK_COMMANDS = {
    ".zst": "zstd -d", ".zstd": "zstd -d", ".bz2": "bunzip2", ".xz": "unxz", ".lz4": "lz4 -d",
    ".lzma": "unlzma", ".br": "brotli -d",
}  # fmt: skip


class DataFileType(NamedTuple):
    """The type of a data file, as its name shows. For ``a.jsonl.gz``, ``suffix`` is ``.jsonl`` and
    ``packed`` is true.
    """

    suffix: str
    packed: bool


def data_file_type(path: Path) -> DataFileType | None:
    """Return the type that the suffix of ``path`` stands for. Return None if the suffix is not that
    of a data file.
    """
    name = path.name.lower()
    packed = name.endswith(GZIP_SUFFIX)
    suffix = Path(name.removesuffix(GZIP_SUFFIX) if packed else name).suffix
    suffixes = TEXT_SUFFIXES if packed else (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
    return DataFileType(suffix, packed) if suffix in suffixes else None


def unsupported_file_message(path: Path) -> tuple[str, str]:
    """Return the message and the fix for a file that does not have the suffix of a data file."""
    suffix = path.suffix.lower()
    what = f"is not a supported type of data file: {suffix or 'no suffix'!r}"
    if suffix in UNPACK_COMMANDS:
        return (
            what,
            f"unpack the file ({UNPACK_COMMANDS[suffix]} {path.name}), or pack it with gzip",
        )
    suffixes = ", ".join(FILE_SUFFIXES)
    return what, f"use a file with suffix {suffixes}, or a folder made by datasets' save_to_disk"


def unreadable_table_message(kind: str, why: str) -> str:
    """The message for a Parquet or Arrow file that cannot be read."""
    return f"is not a readable {kind} file: {why}"


def file_count_message(count: int) -> str:
    """The message for an archive that contains ``count`` data files instead of one."""
    return f"contains {count} data files instead of one"


def path_fault(path: Path) -> str | None:
    """Return a message that says why ``path`` cannot be read as a file; None if it can be read or
    is a folder.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return open_fault(error)
    return None if path.is_dir() else file_type_fault(mode)


@contextmanager
def open_data(path: Path, *, limit: int = MAX_DATA_BYTES) -> Iterator[IO[bytes]]:
    """Open a data file as a stream of its unpacked bytes.

    Raises InputError if the file cannot be opened. Reading the stream raises InputError if the
    content is damaged or has more than ``limit`` bytes.
    """
    with open_bytes(path, limit=limit) as file:
        kind = data_file_type(path)
        if kind is None or not kind.packed:
            yield file
            return
        import gzip  # noqa: PLC0415 - only .gz files need it

        source = gzip.GzipFile(fileobj=file, mode="rb")
        yield io.BufferedReader(UnpackedStream(path, file, source, limit), buffer_size=MIB)


def numbered_lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line, without a byte-order mark. Raises InputError for a line
    that is too long or not UTF-8.
    """
    for number, raw in enumerate(read_lines(file, path), start=1):
        text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        yield number, decode_utf8(text, f"{path}:{number}")


def decode_utf8(raw: bytes, where: str) -> str:
    """Decode UTF-8 bytes. Raises InputError for other bytes; ``where`` is the file and line in its
    message.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise InputError(what, where=where, fix="convert the text to UTF-8, or remove it") from None


def parse_json_value(text: str) -> Any:
    """Parse the text of a JSON value in a data file. Raises ValueError also for two things that
    Python's json module accepts: NaN, and an object with the same key twice (only the last value
    would be kept).
    """
    return _DECODER.decode(text)


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {duplicate[:80]!r} twice")
    return result


_DECODER = json.JSONDecoder(
    parse_constant=_reject_constant, object_pairs_hook=_object_without_duplicates
)


def parse_chat(text: str) -> list[dict[str, Any]] | None:
    """Return the chat (a list of {role, content}) that a text contains as JSON; None if it contains
    no chat.
    """
    if '"role"' not in text or not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    messages = value if isinstance(value, list) else []
    is_chat = all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    )
    return messages if messages and is_chat and is_valid_unicode(messages) else None


def is_valid_unicode(value: object) -> bool:
    """Whether every string in a JSON value is valid text. JSON can contain a lone surrogate, which
    is half of a character.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def find_nul_key(value: object) -> str | None:
    """Return the first key with a NUL character in an object inside a JSON value; None if there is
    no such key. Arrow and datasets end the names of nested fields at a NUL character.
    """
    if isinstance(value, dict):
        key_with_nul = next((key for key in value if "\0" in key), None)
        return key_with_nul if key_with_nul is not None else find_nul_key(list(value.values()))
    if isinstance(value, list):
        return next((key for item in value if (key := find_nul_key(item)) is not None), None)
    return None


def column_names_fault(names: Iterable[str]) -> str | None:
    """Return a message that says what is wrong with column names; None if all are valid."""
    seen: set[str] = set()
    for name in names:
        if not is_valid_unicode(name):
            return f"the column name {name!a} contains half of a character (a lone surrogate)"
        if "\0" in name:
            return f"the column name {name!r} contains a NUL character"
        if name in seen:
            return f"two columns have the same name, {name!r}"
        seen.add(name)
    return None if len(seen) <= MAX_COLUMNS else f"has more than {MAX_COLUMNS} columns"

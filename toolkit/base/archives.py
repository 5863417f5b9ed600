"""Unpack an archive from an untrusted source: every member stays inside the target folder, links
and devices are refused, and the unpacked size is limited.

The extractors of tarfile and zipfile silently change some names and follow some links. This module
changes no name and follows no link. It reads an archive twice: if the first pass finds a bad
member, the whole archive is refused before anything is written. Extra files that macOS adds are
ignored.
"""

from __future__ import annotations

import struct
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from toolkit.base.decompression import (
    FIX_UNPACK_YOURSELF,
    READ_BYTES,
    UNPACKING_ERRORS,
    max_unpacked_bytes,
)
from toolkit.base.errors import ConfigError, InputError
from toolkit.base.files import open_bytes
from toolkit.base.formatting import GIB, MIB, format_bytes
from toolkit.base.paths import FILE_MODE, make_folder, safe_join
from toolkit.base.tar_stream import tar_members

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DEFAULT_LIMIT_BYTES = 64 * GIB
MAX_MEMBERS = 10_000  # an archive has one data file and a few other files
MAX_DIRECTORY_BYTES = 4 * MIB  # the headers of a zip file's members
_ENCRYPTED_FLAG = 1  # a bit of a zip member's flags that means: the member is encrypted
ARCHIVE_ERRORS = (
    *UNPACKING_ERRORS,
    tarfile.TarError,
    zipfile.BadZipFile,
    struct.error,
    NotImplementedError,
    RecursionError,
    OverflowError,
    IndexError,
    KeyError,
    TypeError,
)


class Member(NamedTuple):
    """A regular file or a folder inside an archive. ``open`` returns a stream of its content."""

    name: str
    size_bytes: int
    is_folder: bool
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether the name of the file is that of an archive that ``unpack`` can read."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(archive: Path, into: Path, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Path:
    """Unpack a zip or tar file into the folder ``into``, which must be empty or absent; return
    ``into``.

    Raises ConfigError if a member leads outside ``into``, is a link or a device, or occurs twice,
    and if the unpacked size is above ``limit_bytes``. The size is counted while reading, because
    the sizes in the headers may be wrong. Raises InputError if the archive cannot be read. Errors
    name the archive and its members, never ``into``, which the user may not know.
    """
    if into.exists() and any(into.iterdir()):
        raise ConfigError("the folder to unpack into is not empty", where=str(into))
    with open_bytes(archive) as file, _translate_read_errors(archive):
        with _open_members(archive, file, limit_bytes) as members:
            _check_members(archive, into, members, limit_bytes)
        make_folder(into)
        remaining_bytes = limit_bytes
        with _open_members(archive, file, limit_bytes) as members:
            for member in members:
                remaining_bytes -= _write_member(archive, into, member, remaining_bytes)
    return into


def list_files(archive: Path, *, max_bytes_read: int) -> list[str] | None:
    """Return the names of the files that ``unpack`` would write, without writing anything.

    Return None if the archive is a tar file whose members have more than ``max_bytes_read`` bytes
    in total: to find all names in a compressed tar file, all of it must be unpacked. A zip file has
    one list of all names and needs no unpacking. Raises the same errors as ``unpack``.
    """
    names: list[str] = []
    total_bytes = 0
    max_total_bytes = max_unpacked_bytes(archive.stat().st_size, DEFAULT_LIMIT_BYTES)
    has_member_list = zipfile.is_zipfile(archive)  # a zip file lists its members: none is unpacked
    with (
        open_bytes(archive) as file,
        _translate_read_errors(archive),
        _open_members(archive, file, DEFAULT_LIMIT_BYTES) as members,
    ):
        for member in _checked_members(archive, archive.parent, members, max_total_bytes):
            names += [] if member.is_folder else [member.name]
            total_bytes += member.size_bytes
            if total_bytes > max_bytes_read and not has_member_list:
                return None
    return names


@contextmanager
def _translate_read_errors(archive: Path) -> Iterator[None]:
    """Inside the ``with`` block, turn an error about the bytes of ``archive`` into an InputError
    that names the archive.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # gzip and bz2 raise OSError without a number
            raise _unreadable_error(archive, error) from error
        raise InputError(
            f"cannot be unpacked: {error.strerror or error}", where=str(archive)
        ) from error
    except ARCHIVE_ERRORS as error:
        raise _unreadable_error(archive, error) from error


def _unreadable_error(archive: Path, error: Exception) -> InputError:
    why = "its headers are nested in a loop" if isinstance(error, RecursionError) else error
    return InputError(f"not a readable archive: {why}", where=str(archive))


def _check_members(archive: Path, into: Path, members: Iterator[Member], limit_bytes: int) -> None:
    for _ in _checked_members(archive, into, members, limit_bytes):
        pass


def _checked_members(
    archive: Path, into: Path, members: Iterator[Member], limit_bytes: int
) -> Iterator[Member]:
    """Yield each member after checking that it can be written below ``into``."""
    seen: set[Path] = set()
    total_bytes = 0
    for member in members:
        path = safe_join(into, member.name, what="a member", where=archive)
        if path in seen and not member.is_folder:
            raise ConfigError(f"contains the member {member.name!r} twice", where=str(archive))
        seen.add(path)
        total_bytes += member.size_bytes
        if member.size_bytes < 0 or total_bytes > limit_bytes:
            raise _too_large_error(archive, limit_bytes)
        yield member


def _write_member(archive: Path, into: Path, member: Member, limit_bytes: int) -> int:
    """Write one member; return the number of bytes written, which is at most ``limit_bytes``."""
    try:
        return _copy_member(archive, member, safe_join(into, member.name), limit_bytes)
    except OSError as error:
        raise InputError(
            f"the member {member.name!r} cannot be unpacked: {error.strerror or error}",
            where=str(archive),
        ) from error


def _copy_member(archive: Path, member: Member, path: Path, limit_bytes: int) -> int:
    if member.is_folder:
        make_folder(path)
        return 0
    make_folder(path.parent)
    written_bytes = 0
    with member.open() as source, path.open("xb") as target:
        while chunk := source.read(READ_BYTES):
            written_bytes += len(chunk)
            if written_bytes > limit_bytes:
                raise _too_large_error(archive, limit_bytes)
            target.write(chunk)
    path.chmod(FILE_MODE & path.stat().st_mode)
    return written_bytes


def _too_large_error(archive: Path, limit_bytes: int) -> ConfigError:
    what = f"unpacks to more than {format_bytes(limit_bytes)}"
    return ConfigError(what, where=str(archive), fix=FIX_UNPACK_YOURSELF)


@contextmanager
def _open_members(archive: Path, file: IO[bytes], limit_bytes: int) -> Iterator[Iterator[Member]]:
    """A context manager. Its value is an iterator over the members, in the order of the archive.
    The caller must read the content of a member before it requests the next member.
    """
    file.seek(0)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(_ReadLimitedFile(archive, file)) as zipped:
            yield _zip_members(archive, zipped, limit_bytes)
    else:
        file.seek(0)
        yield _tar_members(archive, file, limit_bytes)


class _ReadLimitedFile:
    """An open zip file that refuses to read too many bytes in one call. The header of a zip file
    may state any size for the central directory (the list of members). Without a limit, zipfile
    would read that many bytes at once.
    """

    def __init__(self, archive: Path, file: IO[bytes]) -> None:
        self.archive, self.file = archive, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY_BYTES:
            raise ConfigError(
                f"has a central directory of {count} bytes, but the limit is {MAX_DIRECTORY_BYTES}",
                where=str(self.archive),
            )
        return self.file.read(count)


def _check_member_count(archive: Path, count: int) -> None:
    """Raise ConfigError if ``count`` is more than the maximum number of members of an archive.
    ``count`` is the number of members that were found so far, including ignored ones.
    """
    if count > MAX_MEMBERS:
        raise ConfigError(
            f"contains more than {MAX_MEMBERS} members",
            where=str(archive),
            fix="unpack the archive, and use the data file in it instead of the archive",
        )


def _is_ignored(name: str) -> bool:
    """Whether a member should be ignored: a file that macOS adds to archives (such as
    ``.DS_Store``), or the entry ``./`` of the packed folder itself.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return (
        (not parts and name != "")
        or "__MACOSX" in parts[:1]
        or any(part.startswith("._") or part == ".DS_Store" for part in parts[-1:])
    )


def _zip_members(archive: Path, zipped: zipfile.ZipFile, limit_bytes: int) -> Iterator[Member]:
    infos = zipped.infolist()
    _check_member_count(archive, len(infos))
    total_bytes = sum(info.file_size for info in infos)
    max_total_bytes = max_unpacked_bytes(archive.stat().st_size, limit_bytes)
    if total_bytes > max_total_bytes:
        raise _too_large_error(archive, max_total_bytes)
    for info in infos:
        if not _is_ignored(info.filename):
            yield _zip_member(archive, zipped, info)


def _zip_member(archive: Path, zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    # The file type in the upper bits of a Unix mode; 0 if the archive was made on another system.
    kind = info.external_attr >> 28
    if kind not in (0, 0o4, 0o10):
        raise _not_a_file_error(archive, info.filename)
    if info.flag_bits & _ENCRYPTED_FLAG:
        raise ConfigError(
            f"the member {info.filename!r} is encrypted",
            where=str(archive),
            fix="pack the archive without a password",
        )
    return Member(info.filename, info.file_size, info.is_dir(), lambda: zipped.open(info))


def _tar_members(archive: Path, file: IO[bytes], limit_bytes: int) -> Iterator[Member]:
    members = tar_members(archive, file, limit_bytes)
    for number, (info, content) in enumerate(members, start=1):
        _check_member_count(archive, number)
        if _is_ignored(info.name):
            continue
        if info.issparse():
            raise ConfigError(
                f"contains a sparse file: {info.name!r}",
                where=str(archive),
                fix="pack the archive without --sparse",
            )
        if not info.isdir() and content is None:
            raise _not_a_file_error(archive, info.name)
        yield Member(info.name, info.size if content else 0, info.isdir(), _make_opener(content))


def _make_opener(content: IO[bytes] | None) -> Callable[[], IO[bytes]]:
    def open_member() -> IO[bytes]:
        assert content is not None  # a folder is not opened
        return content

    return open_member


def _not_a_file_error(archive: Path, name: str) -> ConfigError:
    return ConfigError(
        f"contains a link or a device: {name!r}",
        where=str(archive),
        fix="pack the files themselves (tar --dereference)",
    )

"""Unpack an archive from someone else: members stay inside, links and devices are refused, size is
bounded.

tarfile's and zipfile's own extractors clean some names silently and follow what they must; here
nothing is repaired: one bad member and the whole archive is refused before anything has been
written.
"""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, NamedTuple

from toolkit.base.errors import ConfigError, InputError
from toolkit.base.paths import FILE_MODE, make_folder, safe_join
from toolkit.base.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DEFAULT_LIMIT_BYTES = 64 * GIB
MAX_MEMBERS = 100_000
_CHUNK_BYTES = 1 << 20
_ENCRYPTED = 1  # a bit of a zip member's flags
UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
)


class Member(NamedTuple):
    """A regular file or a folder inside an archive; ``open`` gives its content."""

    name: str
    size_bytes: int
    is_folder: bool
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """By name: what ``unpack`` reads."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(archive: Path, into: Path, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Path:
    """Unpack a zip or tar file into the folder ``into``, which must be empty or absent; return
    ``into``.

    Raises ConfigError for a member that leads outside, is a link or a device, comes twice, or
    makes the whole larger than ``limit_bytes`` (counted while reading: the sizes in the headers
    are not believed); InputError if unreadable. Errors are about the archive and its members,
    never about ``into``, which the user may not know of.
    """
    if into.exists() and any(into.iterdir()):
        raise ConfigError("the folder to unpack into is not empty", where=str(into))
    try:
        with _members(archive) as members:
            _check(archive, into, members, limit_bytes)
            make_folder(into)
            left_bytes = limit_bytes
            for member in members:
                left_bytes -= _write(archive, into, member, left_bytes)
    except UNREADABLE as error:
        raise InputError(f"not a readable archive: {error}", where=str(archive)) from error
    except OSError as error:
        raise InputError(
            f"cannot be unpacked: {error.strerror or error}", where=str(archive)
        ) from error
    return into


def _check(archive: Path, into: Path, members: list[Member], limit_bytes: int) -> None:
    if len(members) > MAX_MEMBERS:
        raise ConfigError(f"holds more than {MAX_MEMBERS} members", where=str(archive))
    seen: set[Path] = set()
    for member in members:
        path = safe_join(into, member.name, what="a member", where=archive)
        if path in seen and not member.is_folder:
            raise ConfigError(f"holds the member {member.name!r} twice", where=str(archive))
        seen.add(path)
    total_bytes = sum(member.size_bytes for member in members)
    if total_bytes > limit_bytes:
        raise _too_large(archive, limit_bytes)


def _write(archive: Path, into: Path, member: Member, limit_bytes: int) -> int:
    """The bytes written, at most ``limit_bytes``."""
    try:
        return _copy(archive, member, safe_join(into, member.name), limit_bytes)
    except OSError as error:
        raise InputError(
            f"the member {member.name!r} cannot be unpacked: {error.strerror or error}",
            where=str(archive),
        ) from error


def _copy(archive: Path, member: Member, path: Path, limit_bytes: int) -> int:
    if member.is_folder:
        make_folder(path)
        return 0
    make_folder(path.parent)
    written_bytes = 0
    with member.open() as source, path.open("xb") as target:
        while chunk := source.read(_CHUNK_BYTES):
            written_bytes += len(chunk)
            if written_bytes > limit_bytes:
                raise _too_large(archive, limit_bytes)
            target.write(chunk)
    path.chmod(FILE_MODE & path.stat().st_mode)
    return written_bytes


def _too_large(archive: Path, limit_bytes: int) -> ConfigError:
    return ConfigError(f"unpacks to more than {format_bytes(limit_bytes)}", where=str(archive))


@contextmanager
def _members(archive: Path) -> Iterator[list[Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            yield [_zip_member(archive, zipped, info) for info in zipped.infolist()]
    else:
        with tarfile.open(archive) as tar:
            yield [_tar_member(archive, tar, info) for info in tar.getmembers()]


def _zip_member(archive: Path, zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    kind = (
        info.external_attr >> 28
    )  # the file type in the upper bits of a Unix mode; 0 if made elsewhere
    if kind not in (0, 0o4, 0o10):
        raise _not_a_file(archive, info.filename)
    if info.flag_bits & _ENCRYPTED:
        raise ConfigError(
            f"the member {info.filename!r} is encrypted",
            where=str(archive),
            fix="pack it without a password",
        )
    return Member(info.filename, info.file_size, info.is_dir(), lambda: zipped.open(info))


def _tar_member(archive: Path, tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    if not (info.isreg() or info.isdir()):
        raise _not_a_file(archive, info.name)

    def open_member() -> IO[bytes]:
        content = tar.extractfile(info)
        assert content is not None  # a regular file
        return content

    return Member(info.name, info.size, info.isdir(), open_member)


def _not_a_file(archive: Path, name: str) -> ConfigError:
    return ConfigError(
        f"holds a link or a device: {name!r}",
        where=str(archive),
        fix="pack the files themselves (tar --dereference)",
    )

"""Turn a disk failure that any library reports into an error with an exit code.

A disk failure has an error number (errno). An OSError has it as an attribute. Rust libraries
(safetensors, tokenizers) write "(os error 28)" into the message, and Arrow writes "[errno 28]". The
archive writer of torch reports no number, so the number is taken from the cause of its error. If no
cause has a number either, the free space shows whether the disk was full.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from toolkit.base.errors import ConfigError, NodeError, ToolkitError, first_line
from toolkit.base.formatting import format_bytes

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE_ERRNOS = (errno.EROFS, errno.EACCES, errno.EPERM)
DEVICE_FAILURE_ERRNOS = (errno.EIO, errno.ESTALE, errno.EREMOTEIO)
FILE_SIZE_ERRNOS = (errno.EFBIG,)
MOUNT_TABLE = Path("/proc/self/mountinfo")
MIN_FREE_BYTES = 1 << 20
"""A file system with fewer free bytes than this counts as full, if an archive writer failed without
an error number.
"""
_ERRNO_IN_TEXT = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.I)
_ERRNO_OF_PHRASE = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
}
# Messages of torch.save in torch 2.11 and 2.13. The second one means that the file is shorter than
# the data that was written.
_ARCHIVE_WRITER_ERROR = re.compile(
    r"PytorchStreamWriter failed|inline_container\.cc\S* \. unexpected pos"
)


def find_failure(
    error: BaseException | None, path: Path | None = None
) -> tuple[int, str | None] | None:
    """Return (errno, file name or None) of the disk failure that ``error`` or one of its causes
    reports; None if there is no disk failure.

    ``path`` is the path that was written to. If an archive writer failed without an error number,
    the free space of the file system of ``path`` shows whether the disk was full.
    """
    seen = set[int]()
    writer_failed = False
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = _errno_of(error)
        if number in (
            *DISK_FULL_ERRNOS,
            *NOT_WRITABLE_ERRNOS,
            *DEVICE_FAILURE_ERRNOS,
            *FILE_SIZE_ERRNOS,
        ):
            name = getattr(error, "filename", None)
            return number, name if isinstance(name, str) else None
        is_writer_error = bool(_ARCHIVE_WRITER_ERROR.search(str(error)))
        writer_failed = writer_failed or is_writer_error
        # An error that was already handled is not a cause, unless a writer raised the next error
        # while it closed its file.
        error = error.__cause__ or (error.__context__ if is_writer_error else None)
    if writer_failed and path is not None:
        free_disk_bytes = free_bytes(path)
        is_full = free_disk_bytes is not None and free_disk_bytes < MIN_FREE_BYTES
        return (errno.ENOSPC if is_full else errno.EIO), None
    return None


def _errno_of(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, (ToolkitError, KeyboardInterrupt, SystemExit)):
        return None
    text = str(error)
    if match := _ERRNO_IN_TEXT.search(text):
        number = int(match[1] or match[2])
        return (
            number
            if number in (*DISK_FULL_ERRNOS, *DEVICE_FAILURE_ERRNOS, *FILE_SIZE_ERRNOS, errno.EROFS)
            else None
        )
    return next(
        (number for words, number in _ERRNO_OF_PHRASE.items() if words in text.lower()), None
    )


def to_toolkit_error(
    error: Exception,
    where: str | Path,
    *,
    needed: int | None = None,
    kept_note: str = "; the last checkpoint is intact",
) -> ToolkitError | None:
    """Return the error to report for a disk failure; None if ``error`` is not a disk failure.

    ``where`` is the path that was written to. It is used only if ``error`` names no file.
    ``needed`` is the number of bytes to write. ``kept_note`` is added to the message and says what
    is not lost. If the file system is full or read-only, the exit code is 1 (the user must act). If
    the file system fails, the exit code is 3 (the node is bad).
    """
    failure = find_failure(error, Path(where))
    if failure is None:
        return None
    number, name = failure
    path = name or str(where)
    reason = os.strerror(number)
    system = file_system(Path(path))
    if number in DISK_FULL_ERRNOS:
        return ConfigError(
            f"the disk is full ({reason}){_space_summary(Path(path), number, needed, name)}"
            f"{kept_note}",
            where=f"{path}{system}",
            fix=(
                "free some disk space, or set runtime.output_dir to a folder on another disk; then "
                "start the same command again"
            ),
        )
    if number in FILE_SIZE_ERRNOS:
        return ConfigError(
            f"the file would be larger than the limit of this process (ulimit -f) or of the file"
            f" system ({reason}){kept_note}",
            where=f"{path}{system}",
            fix="raise the limit on the size of a file, or set runtime.output_dir to a folder on"
            " another file system; then start the same command again",
        )
    if number in NOT_WRITABLE_ERRNOS:
        return ConfigError(
            f"cannot write: {reason}",
            where=f"{path}{system}",
            fix="set runtime.output_dir to a writable folder",
        )
    return NodeError(
        f"the disk failed: {reason} ({type(error).__name__}: {first_line(error)})",
        where=f"{path}{system}",
        fix="search the kernel log of the node (`dmesg`) for errors of this file system, and start"
        " the same command on another node, or set runtime.output_dir to another file system",
    )


def to_toolkit_error_without_path(error: Exception) -> ToolkitError | None:
    """Return the error to report for a disk failure, as ``to_toolkit_error`` does. This function is
    for callers that do not know which path was written to.

    Return None if ``error`` is not a disk failure. Also return None for a missing permission: it
    may be the permission to read a file, and ``to_toolkit_error`` would report a failed write.
    """
    failure = find_failure(error)
    if failure is None or failure[0] in (errno.EACCES, errno.EPERM):
        return None
    return to_toolkit_error(error, failure[1] or Path.cwd(), kept_note="")


def _space_summary(path: Path, number: int, needed: int | None, name: str | None) -> str:
    """Return a text about disk space: the needed, the free and the missing bytes."""
    free = None if number == errno.EDQUOT else free_bytes(path)
    needed_text = "" if needed is None else f"{format_bytes(needed)} needed"
    if free is None:
        return f": {needed_text}" if needed_text else ""
    parts = [part for part in (needed_text, f"{format_bytes(free)} free") if part]
    if needed is not None and needed > free:
        parts.append(f"{format_bytes(needed - free)} missing")
    elif name is None and free >= MIN_FREE_BYTES:
        places = "/tmp, /dev/shm, the caches, and the file that the output is redirected to"
        parts.append(f"the error names no file, so check {places}")
    return f": {', '.join(parts)}"


def free_bytes(path: Path) -> int | None:
    """Free bytes for this user on the file system of ``path`` (or of its nearest existing
    parent).
    """
    try:
        status = os.statvfs(_nearest_existing(path))
    except OSError:
        return None
    if status.f_blocks == 0:  # a file system that does not report its free space
        return None
    blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail
    return blocks * status.f_frsize


def file_system(path: Path) -> str:
    """Return a text that names the file system of ``path``, such as `` (file system /data, ext4)``;
    empty if the kernel does not report it.
    """
    try:
        real = str(_nearest_existing(path).resolve())
        lines = MOUNT_TABLE.read_text(errors="replace").splitlines()
    except (OSError, RuntimeError):
        return ""
    best = ("", "")
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 5 or " - " not in line:
            continue
        mount = _unescape_octal(fields[4])
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        # if two file systems are mounted at one path, the later one is visible
        if inside and len(mount) >= len(best[0]):
            best = mount, line.partition(" - ")[2].split(" ")[0]
    return f" (file system {best[0]}, {best[1]})" if best[0] else ""


def _nearest_existing(path: Path) -> Path:
    return next((p for p in (path, *path.parents) if p.exists()), Path())


def _unescape_octal(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)

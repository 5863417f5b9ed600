"""What a disk says when it fails, whichever library passes it on, as an error with an exit code.

OSError carries a number; Rust (safetensors, tokenizers) writes "(os error 28)" into its text, Arrow
"[errno 28]", and torch's archive writer gives no number at all, but chains the error or leaves a
disk on which nothing is free.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from toolkit.base.errors import ConfigError, NodeError, ToolkitError, first_line
from toolkit.base.formatting import format_bytes

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
FAILED = (errno.EIO,)
MOUNTS = Path("/proc/self/mountinfo")
LEAST_FREE = 1 << 20
"""A file system with less free is full, where a writer does not say why it failed."""
_NUMBER = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.I)
_WORDS = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
}
# torch 2.11 and 2.13, of torch.save; the second where the file ends before what was written.
_WRITERS = re.compile(r"PytorchStreamWriter failed|inline_container\.cc\S* \. unexpected pos")


def reason(error: BaseException | None, near: Path | None = None) -> tuple[int, str | None] | None:
    """(errno, file name where one is told) of a disk's failure in ``error`` or in what it was made
    of; None where there is none. ``near`` is what was written to, for writers that say too little.
    """
    seen = set[int]()
    silent = False
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = _number(error)
        if number in (*FULL, *CLOSED, *FAILED):
            name = getattr(error, "filename", None)
            return number, name if isinstance(name, str) else None
        writer = bool(_WRITERS.search(str(error)))
        silent = silent or writer
        # What was handled before says nothing of the failure, but where a writer closes its file.
        error = error.__cause__ or (error.__context__ if writer else None)
    if silent and near is not None:
        free = free_bytes(near)
        full = free is not None and free < LEAST_FREE
        return (errno.ENOSPC if full else errno.EIO), None
    return None


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, (ToolkitError, KeyboardInterrupt, SystemExit)):
        return None
    text = str(error)
    if match := _NUMBER.search(text):
        number = int(match[1] or match[2])
        return number if number in (*FULL, *FAILED, errno.EROFS) else None
    return next((number for words, number in _WORDS.items() if words in text.lower()), None)


def translate(
    error: Exception,
    where: str | Path,
    *,
    needed: int | None = None,
    kept: str = "; the last checkpoint is whole",
) -> ToolkitError | None:
    """The error that a person and a scheduler can act on; None where no disk failed.

    ``where`` is what was written to, unless the error names a file; ``needed``: the bytes that were
    to be written; ``kept``: what is not lost. A full or closed file system is the user's to change
    (1), one that fails is the node's (3).
    """
    found = reason(error, Path(where))
    if found is None:
        return None
    number, name = found
    place = name or str(where)
    said = os.strerror(number)
    system = file_system(Path(place))
    if number in FULL:
        return ConfigError(
            f"the disk is full ({said}){_account(Path(place), number, needed, name)}{kept}",
            where=f"{place}{system}",
            fix="free space or name another runtime.output_dir, then start the same command again",
        )
    if number in CLOSED:
        return ConfigError(
            f"cannot write: {said}", where=f"{place}{system}", fix="name another runtime.output_dir"
        )
    return NodeError(
        f"the disk failed: {said} ({type(error).__name__}: {first_line(error)})",
        where=f"{place}{system}",
        fix="look at the node's log (dmesg) for this file system, and start the same command on"
        " another node, or with another runtime.output_dir",
    )


def failed(error: Exception) -> ToolkitError | None:
    """``translate`` for a command that knows no more than the error: a disk that is full, closed or
    broken, and no file that may not be read.
    """
    found = reason(error)
    if found is None or found[0] in (errno.EACCES, errno.EPERM):
        return None
    return translate(error, found[1] or Path.cwd(), kept="")


def _account(place: Path, number: int, needed: int | None, name: str | None) -> str:
    """What was needed, what is free, and what is missing."""
    free = None if number == errno.EDQUOT else free_bytes(place)
    wanted = "" if needed is None else f"{format_bytes(needed)} needed"
    if free is None:
        return f": {wanted}" if wanted else ""
    parts = [part for part in (wanted, f"{format_bytes(free)} free") if part]
    if needed is not None and needed > free:
        parts.append(f"{format_bytes(needed - free)} missing")
    elif name is None and free >= LEAST_FREE:
        parts.append("the file is not named: look at /tmp, /dev/shm and the caches too")
    return f": {', '.join(parts)}"


def free_bytes(path: Path) -> int | None:
    """Free for this user on the file system of ``path`` (or of the folder above that exists)."""
    try:
        found = os.statvfs(_existing(path))
    except OSError:
        return None
    if found.f_blocks == 0:  # a file system that does not count
        return None
    blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
    return blocks * found.f_frsize


def file_system(path: Path) -> str:
    """`` (file system /data, ext4)`` of ``path``; empty where the kernel does not tell."""
    try:
        real = str(_existing(path).resolve())
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except (OSError, RuntimeError):
        return ""
    best = ("", "")
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 5 or " - " not in line:
            continue
        mount = _unescaped(fields[4])
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[0]):  # of two at one place the later one covers
            best = mount, line.partition(" - ")[2].split(" ")[0]
    return f" (file system {best[0]}, {best[1]})" if best[0] else ""


def _existing(path: Path) -> Path:
    return next((p for p in (path, *path.parents) if p.exists()), Path())


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)

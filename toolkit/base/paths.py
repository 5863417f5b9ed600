"""Access files safely: join an untrusted name to a folder, and create files that only their owner
can change.

Names that come from a file (a weights index, the state of a saved dataset, a member of an archive)
are joined with ``safe_join``. ``make_folder``, ``write_file`` and ``append_line`` create files with
mode 0644 or stricter (folders: 0755). ``rewrite_file`` changes a user's file.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path, PurePosixPath, PureWindowsPath

from toolkit.base.errors import ConfigError

FILE_MODE = 0o644
FOLDER_MODE = 0o755


def tighten_umask() -> int:
    """Remove write permission for group and others from all files that this process creates from
    now on. Return the old umask.

    Libraries (safetensors, transformers, datasets) create files with mode 0666 and rely on the
    umask, which clusters often set to 0. A stricter umask is kept.
    """
    old = os.umask(0o022)
    os.umask(old | 0o022)
    return old


def safe_join(
    root: Path,
    name: str,
    *,
    what: str = "a file name",
    where: Path | None = None,
    links: bool = False,
) -> Path:
    """Return ``root / name`` for a ``name`` from an untrusted source. The result must not be
    outside ``root``.

    Raises ConfigError if ``name`` is empty or an absolute path, or if it contains a drive, ``..``
    or a NUL character. Also raises ConfigError if the path is a link to a place outside ``root``,
    unless ``links`` is true (the hub cache consists of such links). The error names ``where``
    (default ``root``) as the place of the problem. ``what`` is the noun for ``name`` in the
    message, such as "a member".
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    outside = relative.is_absolute() or PureWindowsPath(name).drive != "" or ".." in relative.parts
    if outside or "\0" in name or relative == PurePosixPath():
        raise ConfigError(
            f"{what} leads outside its folder: {name!r}",
            where=str(where or root),
            fix="get the file again from a trusted source, because it is damaged or malicious",
        )
    path = root / relative
    if not links and not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"{what} is a link that leads outside its folder: {name!r} -> {path.resolve()}",
            where=str(where or root),
            fix="copy the file itself into the folder",
        )
    return path


def make_folder(path: Path) -> Path:
    """Create ``path`` and its missing parents with mode 0755 minus the umask. Existing folders keep
    their mode.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    return path


def write_file(
    path: Path, content: str | bytes, *, durable: bool = False, mode: int = FILE_MODE
) -> Path:
    """Replace ``path`` by ``content`` in one step: a reader sees the old file or the new one, never
    a partly written file.

    The new file has the mode ``mode`` minus the umask. With ``durable``, the content and the
    directory entry are on the disk when this function returns. If ``path`` is a link, the file
    replaces the link. Raises OSError, also if ``path`` is a device, a pipe or a socket.
    """
    _refuse_special_file(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)
    return path


def write_named_file(path: Path, content: str) -> Path:
    """Call ``write_file`` for a path that the user named. If the path is a link, replace the file
    that the link leads to, and keep the link. Raises OSError.
    """
    if path.is_symlink() and path.exists():
        _refuse_special_file(path.resolve())
        write_file(path.resolve(), content)
        return path
    return write_file(path, content)


def _refuse_special_file(path: Path) -> None:
    """Raise OSError if ``path`` is a device, a pipe or a socket. ``write_file`` renames a temporary
    file to ``path``. Without this check, it would replace the device (as root even ``/dev/null``).
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def rewrite_file(path: Path, content: str) -> None:
    """Replace the content of a user's file. Its mode stays, and a link stays a link. Raises
    OSError.
    """
    target = path.resolve()
    mode = stat.S_IMODE(target.stat().st_mode)
    write_file(target, content, mode=mode)
    target.chmod(mode)  # restores the bits that the umask removed


def append_line(path: Path, line: str) -> None:
    """Append one line in one write, so that lines of several processes do not mix.

    Raises OSError. A link and a pipe are errors too, so this function never follows a link and
    never waits for the reader of a pipe.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    handle = os.open(path, flags, FILE_MODE)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        os.write(handle, (line.rstrip("\n") + "\n").encode())
    finally:
        os.close(handle)


def set_mode(path: Path) -> None:
    """Set the mode of a file that a library created: 0644 minus the umask, or 0755 minus the umask
    for a folder. Raises OSError.
    """
    mode = FOLDER_MODE if path.is_dir() else FILE_MODE
    path.chmod(mode & ~_read_umask())


def set_modes(folder: Path) -> None:
    """Call ``set_mode`` for a folder and everything in it. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        set_mode(path)


def _read_umask() -> int:
    """Return the umask of this process. If /proc does not report the umask, change it for a moment,
    because that is the only other way to read it.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("\nUmask:")[2].split()[0], 8)
    except (OSError, IndexError, ValueError):
        old = os.umask(0o077)
        os.umask(old)
        return old


def sync_folder(path: Path) -> None:
    """Wait until the directory entries of a folder are on the disk (``fsync``). A rename alone does
    not guarantee this.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Read a run file as text. The size of the file and the time to wait for a pipe are limited."""

from __future__ import annotations

import codecs
import os
import select
import stat
import sys
import time
from pathlib import Path

from toolkit.config.document import Document, StopReading, empty_root
from toolkit.config.finding import Finding, Fix, error_finding
from toolkit.config.source import MAX_BYTES, PIPE_WAIT_S, Source

FORMAT_BY_SUFFIX = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml"}
STDIN = "-"
UNREADABLE_RULE = "DOC014"
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class UnreadableText(StopReading):
    """Raised if the text of a run file cannot be read. ``finding`` says why."""


def read_source(path: str | Path, *, real_path: Path | None = None) -> Source:
    """Return the text of the run file at ``path`` (``-`` is standard input). If ``real_path`` is
    given, the file at ``real_path`` is read instead, but findings show ``path``. Raises
    UnreadableText if the text cannot be read.
    """
    if str(path) == STDIN:
        source = Source("<stdin>", "", Path.cwd(), None, "stdin")
        return _decode(source, _read_descriptor(source, sys.stdin.fileno(), None))
    file = Path(path)
    source = Source(
        str(path),
        "",
        Path(os.path.abspath(file)).parent,
        Path(os.path.abspath(file)),
        FORMAT_BY_SUFFIX.get(file.suffix.lower(), "yaml"),
    )
    try:
        return _decode(source, _read_file(source, real_path or file))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableText(unreadable_finding(source, f"cannot be read: {reason}")) from None


def unreadable_finding(source: Source, message: str, *fixes: Fix) -> Finding:
    """Return the finding for a file that cannot be read."""
    return error_finding(UNREADABLE_RULE, message, source, None, *fixes)


def failed_document(finding: Finding) -> Document:
    """Return an empty document with ``finding`` as its only finding. ``finding`` says why the run
    file could not be read.
    """
    source = finding.source or Source("run file", "", Path.cwd())
    return Document(source, empty_root(source), [finding], is_readable=False)


def _read_file(source: Source, file: Path) -> bytes:
    # Open without blocking, because opening a named pipe without a writer would block forever.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableText(unreadable_finding(source, "is a folder, not a run file"))
        if stat.S_ISREG(status.st_mode) and status.st_size > MAX_BYTES:
            message = f"has {status.st_size} bytes, but a run file may have at most {MAX_BYTES}"
            notebook = file.suffix.lower() == ".ipynb"
            command = f"toolkit import {source.name}"
            fixes = [Fix(f"make a run file from the notebook with `{command}`")] if notebook else []
            raise UnreadableText(unreadable_finding(source, message, *fixes))
        return _read_descriptor(
            source, descriptor, None if stat.S_ISREG(status.st_mode) else PIPE_WAIT_S
        )
    finally:
        os.close(descriptor)


def _read_descriptor(source: Source, descriptor: int, wait_s: float | None) -> bytes:
    """Return all bytes up to the end of the file or pipe ``descriptor``. Raises UnreadableText if
    there are more than MAX_BYTES bytes, or if the writer of a pipe does not close the pipe within
    ``wait_s`` seconds (None: no limit).
    """
    chunks: list[bytes] = []
    total_bytes = 0
    deadline = None if wait_s is None else time.monotonic() + wait_s
    while total_bytes <= MAX_BYTES:
        if deadline is not None:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or not select.select([descriptor], [], [], remaining_s)[0]:
                raise UnreadableText(
                    unreadable_finding(
                        source, f"the writer of this pipe did not close it within {wait_s} s"
                    )
                )
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            continue
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        total_bytes += len(chunk)
    raise UnreadableText(
        unreadable_finding(source, f"has more than {MAX_BYTES} bytes, the limit for a run file")
    )


def _decode(source: Source, data: bytes) -> Source:
    for mark, name in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            raise UnreadableText(
                unreadable_finding(
                    source,
                    f"is {name}; a run file must be UTF-8",
                    Fix("save the file as UTF-8"),
                )
            )
    bom = "\ufeff" if data.startswith(codecs.BOM_UTF8) else ""
    try:
        text = data[len(codecs.BOM_UTF8) if bom else 0 :].decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 text: byte 0x{data[error.start]:02x} on line {line}"
        raise UnreadableText(
            unreadable_finding(source, message, Fix("save the file as UTF-8"))
        ) from None
    format_name = source.format
    if format_name == "stdin":
        format_name = "json" if text.lstrip()[:1] == "{" else "yaml"
    return Source(source.name, text, source.folder, source.path, format_name, bom)

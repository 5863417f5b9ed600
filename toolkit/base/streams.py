"""Standard output and error of a process that has more to do than to be read.

The reader may go away (``| head``, a log shipper that died), the disk under a redirected stream may
be full, the terminal may close, and a stream may be closed from the start. A run goes on without.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STANDARD = 3


def open_missing() -> None:
    """Give a closed stdin, stdout or stderr (``>&-``) the null device: the next file to be opened
    would take its number, and whatever prints would write into that file.
    """
    for number in range(STANDARD):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - a stream


@contextmanager
def outliving() -> Iterator[None]:
    """While this is open, a stdout or stderr that takes nothing any more is no error: it is said
    once on the other one, and what follows is dropped.
    """
    before = sys.stdout, sys.stderr
    err = Outliving(before[1], "stderr", None)
    sys.stdout = cast("TextIO", Outliving(before[0], "stdout", err))
    sys.stderr = cast("TextIO", err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Outliving:
    """A text stream that fails once and is the null device from then on. ``told``: where that is
    said. Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO, name: str, told: Outliving | None) -> None:
        self._stream, self._name, self._told = stream, name, told
        self._lost = False

    def write(self, text: str) -> int:
        """Write, or drop."""
        if not self._lost:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write, or drop."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or drop."""
        if not self._lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._lost = True
        discard(self._stream)
        if self._told is not None:
            said = getattr(error, "strerror", None) or str(error)
            self._told.write(
                f"warning: {self._name} is lost ({said}); the run goes on without it\n"
            )
            self._told.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard(stream: TextIO) -> None:
    """Make the null device of what is under ``stream``: what it still holds goes there, at the
    latest at the end of the process, which would otherwise change the exit code (to 120).
    """
    with suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
    with suppress(OSError, ValueError):
        stream.flush()


def settle() -> None:
    """At the end of a process: what the streams still hold is written, or dropped."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            discard(stream)

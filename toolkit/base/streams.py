"""Keep a run alive when its standard output or error is lost.

The reader of a pipe may end (``| head``, a log shipper that died), the disk under a redirected
stream may be full, the terminal may close, or a stream may be closed from the start. The run
continues without that stream.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STANDARD_STREAM_COUNT = 3


def open_missing_streams() -> None:
    """Connect a closed stdin, stdout or stderr (``>&-``) to the null device. Otherwise the next
    file that is opened would get the descriptor of the closed stream, and prints would go into that
    file.
    """
    for number in range(STANDARD_STREAM_COUNT):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            # processes that this process starts inherit the descriptors
            os.set_inheritable(number, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - the stream stays open


@contextmanager
def ignore_lost_streams() -> Iterator[None]:
    """A context in which a failing stdout or stderr raises no error. Further output to the failed
    stream is dropped. A failure of stdout is reported once on stderr.
    """
    old_streams = sys.stdout, sys.stderr
    stderr = LossTolerantStream(old_streams[1], "stderr", None)
    sys.stdout = cast("TextIO", LossTolerantStream(old_streams[0], "stdout", stderr))
    sys.stderr = cast("TextIO", stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = old_streams


class LossTolerantStream:
    """A wrapper around a text stream that may fail during the run. After the first failure, all
    output to the stream is dropped, and its file descriptor is connected to the null device. One
    warning about the failure is written to ``warning_stream``. All other attributes are those of
    the wrapped stream.
    """

    def __init__(
        self, stream: TextIO, name: str, warning_stream: LossTolerantStream | None
    ) -> None:
        self._stream, self._name, self._warning_stream = stream, name, warning_stream
        self._is_lost = False

    def write(self, text: str) -> int:
        """Write the text, or drop it after a failure."""
        if not self._is_lost:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines, or drop them after a failure."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream; do nothing after a failure."""
        if not self._is_lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._is_lost = True
        discard_output(self._stream)
        if self._warning_stream is not None:
            reason = getattr(error, "strerror", None) or str(error)
            self._warning_stream.write(
                f"warning: {self._name} is lost ({reason}); the run continues without it\n"
            )
            self._warning_stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard_output(stream: TextIO) -> None:
    """Connect the descriptor of the failed ``stream`` to the null device, and flush ``stream``, so
    that its buffered output is lost. Without this, Python would flush the output when the process
    ends, fail again, and change the exit code to 120.
    """
    with suppress(OSError, ValueError, AttributeError):
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
    with suppress(OSError, ValueError):
        stream.flush()


def flush_output() -> None:
    """Write the buffered output of stdout and stderr at the end of the process. If writing fails,
    drop the output.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            discard_output(stream)

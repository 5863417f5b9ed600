"""Run one tracker in its own thread. The run does not wait for the tracker, and an error of the
tracker is only reported.
"""

from __future__ import annotations

import queue
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

from toolkit.base.abandoned_threads import THREAD_NAME_PREFIX
from toolkit.base.errors import first_line
from toolkit.base.secrets import redact

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_QUEUED_CALLS = 1000
"""Maximum number of queued calls of a slow tracker. Further calls are dropped and counted."""
MAX_FAILURES = 5
"""The number of consecutive failed calls after which the tracker is stopped."""


class TrackerThread:
    """One tracker, its thread, and the queue of calls for the tracker. The function
    ``make_tracker`` creates the tracker in the thread.

    A tracker has the methods ``log_row(step, numbers)``, ``log_table(step, rows)`` and ``close()``.
    Its attribute ``destination`` is a text that says where the tracker writes.
    """

    def __init__(self, tracker: str, make_tracker: Callable[[], Any]) -> None:
        self.tracker, self._make_tracker = tracker, make_tracker
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(MAX_QUEUED_CALLS)
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._dropped_calls = 0
        self._stopped = threading.Event()
        # A daemon thread, because a tracker that hangs must not keep the process alive.
        self._thread = threading.Thread(
            target=self._run, name=f"{THREAD_NAME_PREFIX}{tracker}", daemon=True
        )
        self._thread.start()

    def queue_call(self, method: str, *arguments: Any) -> None:
        """Add a call of the tracker's method ``method`` to the queue. If the queue is full, the
        call is dropped.
        """
        if self._stopped.is_set():
            return
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            self._dropped_calls += 1

    def finish(self) -> None:
        """Tell the thread to close the tracker after all queued calls."""
        try:
            self._calls.put_nowait(None)
        except queue.Full:
            self._stopped.set()

    def wait(self, seconds: float) -> float:
        """Wait until the thread ends, but at most ``seconds``. Return the seconds that are left."""
        begin = monotonic()
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            waiting = self._calls.qsize()
            self._stopped.set()
            self._messages.put(
                f"did not finish in time; {waiting} updates were not sent, but metrics.jsonl "
                "contains every row"
            )
        if self._dropped_calls:
            self._messages.put(
                f"too slow: {self._dropped_calls} updates were not sent, but metrics.jsonl "
                "contains every row"
            )
            self._dropped_calls = 0
        return max(0.0, seconds - (monotonic() - begin))

    def new_messages(self) -> list[str]:
        """Return the messages about the tracker since the previous call of this method, one line
        each.
        """
        lines = []
        while not self._messages.empty():
            lines.append(self._messages.get())
        return lines

    def _run(self) -> None:
        try:
            tracker = self._make_tracker()
        except BaseException as error:  # noqa: BLE001 - no error of a tracker may stop the run
            self._report_failure(error, "could not start")
            return
        if getattr(tracker, "destination", None):
            self._messages.put(tracker.destination)
        failures = 0
        while (call := self._calls.get()) is not None:
            if self._stopped.is_set():
                break
            try:
                getattr(tracker, call[0])(*call[1])
                failures = 0
            except BaseException as error:  # noqa: BLE001 - as above
                failures += 1
                if failures == MAX_FAILURES:
                    self._report_failure(error, f"failed {MAX_FAILURES} times in a row")
                    return
        try:
            tracker.close()
        except BaseException as error:  # noqa: BLE001 - as above
            self._report_failure(error, "could not be closed")
        self._stopped.set()

    def _report_failure(self, error: BaseException, problem: str) -> None:
        self._stopped.set()
        error_class = type(error).__name__
        self._messages.put(
            redact(
                f"{problem}: {error_class}: {_error_text(error)}; the run continues without "
                "this tracker, and metrics.jsonl contains every row"
            )
        )


def _error_text(error: BaseException) -> str:
    try:
        return first_line(error)
    except Exception:  # noqa: BLE001 - the error's __str__ is code of the tracker and may raise
        return "(no text)"

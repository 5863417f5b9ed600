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
    """One tracker, its thread, and the queue of calls for the tracker. The function ``make``
    creates the tracker in the thread.

    A tracker has the methods ``row(step, numbers)``, ``table(step, rows)`` and ``close()``. Its
    attribute ``note`` is a text that says where the tracker writes.
    """

    def __init__(self, tracker: str, make: Callable[[], Any]) -> None:
        self.tracker, self._make = tracker, make
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(MAX_QUEUED_CALLS)
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._left_out = 0
        self._over = threading.Event()
        # A daemon thread, because a tracker that hangs must not keep the process alive.
        self._thread = threading.Thread(
            target=self._work, name=f"{THREAD_NAME_PREFIX}{tracker}", daemon=True
        )
        self._thread.start()

    def put(self, method: str, *arguments: Any) -> None:
        """Add a call of the tracker's method ``method`` to the queue. If the queue is full, the
        call is dropped.
        """
        if self._over.is_set():
            return
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            self._left_out += 1

    def finish(self) -> None:
        """Tell the thread to close the tracker after all queued calls."""
        try:
            self._calls.put_nowait(None)
        except queue.Full:
            self._over.set()

    def wait(self, seconds: float) -> float:
        """Wait until the thread ends, but at most ``seconds``. Return the seconds that are left."""
        begin = monotonic()
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            waiting = self._calls.qsize()
            self._over.set()
            self._news.put(
                f"did not finish in time; {waiting} updates were not sent, but metrics.jsonl "
                "contains every row"
            )
        if self._left_out:
            self._news.put(
                f"too slow: {self._left_out} updates were not sent, but metrics.jsonl contains "
                "every row"
            )
            self._left_out = 0
        return max(0.0, seconds - (monotonic() - begin))

    def news(self) -> list[str]:
        """Return the messages about the tracker since the previous call of this method, one line
        each.
        """
        lines = []
        while not self._news.empty():
            lines.append(self._news.get())
        return lines

    def _work(self) -> None:
        try:
            tracker = self._make()
        except BaseException as error:  # noqa: BLE001 - no error of a tracker may stop the run
            self._give_up(error, "could not start")
            return
        if getattr(tracker, "note", None):
            self._news.put(tracker.note)
        failures = 0
        while (call := self._calls.get()) is not None:
            if self._over.is_set():
                break
            try:
                getattr(tracker, call[0])(*call[1])
                failures = 0
            except BaseException as error:  # noqa: BLE001 - as above
                failures += 1
                if failures == MAX_FAILURES:
                    self._give_up(error, f"failed {MAX_FAILURES} times in a row")
                    return
        try:
            tracker.close()
        except BaseException as error:  # noqa: BLE001 - as above
            self._give_up(error, "could not be closed")
        self._over.set()

    def _give_up(self, error: BaseException, what: str) -> None:
        self._over.set()
        kind = type(error).__name__
        self._news.put(
            redact(
                f"{what}: {kind}: {_text(error)}; the run continues without this tracker, and"
                " metrics.jsonl contains every row"
            )
        )


def _text(error: BaseException) -> str:
    try:
        return first_line(error)
    except Exception:  # noqa: BLE001 - the error's __str__ is code of the tracker and may raise
        return "(no text)"

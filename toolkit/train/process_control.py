"""Messages between the processes of a run, for example when one of them fails.

The messages use the key-value store of torch's rendezvous. They do not use torch's collectives,
because a collective fails if one of the processes has ended. When a process fails, one process
reports the failure, and the others exit silently with the same exit code.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from toolkit.base.errors import RetryError, StoppedError, ToolkitError
from toolkit.base.process_environment import rank, world_size
from toolkit.engine.mesh import COLLECTIVE_TIMEOUT_S, join_default_group
from toolkit.engine.together import PeerOutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")
__all__ = ["PeerFailed", "Peers", "is_first_rank", "join", "rank", "world_size"]

POLL_S, LISTEN_INTERVAL_S = 0.05, 0.3
ANSWER_TIMEOUT_S = 3.0
"""Seconds that a process may take to answer another process. The process that reports a failure has
the same time for its report.
"""
MAX_TICK_S = 1.0
"""The most seconds that a tick of ``_SignsOfLife`` counts. If two ticks are further apart, this
process was stopped (SIGSTOP) between them, and the rest of the time does not count.
"""
REPORT_TIMEOUT_FACTOR = 4
"""The time limit for reporting an error is ``REPORT_TIMEOUT_FACTOR`` x ``ANSWER_TIMEOUT_S``. It is
needed because a call of the store does not return while the process that hosts the store is
stopped.
"""
_GONE = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection (?:was )?(?:closed|refused|reset)"
    r"|remote process exited|ncclRemoteError|gloo.*(?:read|write) error|socket timeout|timed out"
    r" waiting|collective operation timeout",
    re.I | re.S,
)


def is_first_rank() -> bool:
    """True in the process with rank 0, which writes the files and the output of the run."""
    return rank() == 0


class PeerFailed(Exception):
    """Another process has failed, or does not answer."""


def join(timeout_s: float | None = None) -> Peers | None:
    """Connect to the other processes of the run. Return None if there is only one process.

    Raises:
        RetryError: the processes did not connect in time.
    """
    if world_size() == 1:
        return None
    patience = timedelta(seconds=timeout_s or COLLECTIVE_TIMEOUT_S)
    try:
        store, number, size = next(rendezvous("env://", timeout=patience))
        join_default_group(timeout_s, PrefixStore("group", store))
    except (RuntimeError, ValueError) as problem:
        raise RetryError(
            (
                f"the {world_size()} processes of this run did not connect to each other: "
                f"{_line(problem)}"
            ),
            where=f"process {rank()}, MASTER_ADDR={os.environ.get('MASTER_ADDR', '')}",
            fix="use torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as"
            " torchrun does",
        ) from problem
    return Peers(PrefixStore("toolkit", store), number, size, patience.total_seconds())


class Peers:
    """Exchanges messages with the other processes of the run through the key-value ``store``.

    A thread reads from the store whether another process has failed. The thread also increments a
    counter of this process in the store, as a sign of life. If the counter of a process does not
    change for ``patience_s`` seconds (``grpo.ddp_timeout``), the other processes no longer wait for
    that process.
    """

    def __init__(
        self, store: Any, own_rank: int, size: int, patience_s: float = COLLECTIVE_TIMEOUT_S
    ) -> None:
        self.store, self.rank, self.size = store, own_rank, size
        self.patience_s = patience_s
        self.failure_exit_code: int | None = None
        self._over = threading.Event()
        threading.Thread(target=self._listen, name="toolkit-peers", daemon=True).start()

    def exchange(self, name: str, value: Any = None) -> list[Any]:
        """Send ``value`` (a JSON value) to all processes under the key ``name``. Wait for their
        values, and return the values of all processes, by rank. There is no time limit while the
        other processes show signs of life.

        Raises:
            PeerFailed: another process has failed, or shows no sign of life.
        """
        signs = _SignsOfLife()
        # In a thread, because a call of the store does not return while the process that hosts the
        # store is stopped.
        outcome = _started(lambda: self._exchange(name, value, signs))
        while not wait([outcome], POLL_S).done:
            signs.tick()
            if signs.silence_s() > self.patience_s:
                raise PeerFailed(f"a process showed no sign of life for {self.patience_s:g} s")
        return outcome.result()

    def _exchange(self, name: str, value: Any, signs: _SignsOfLife) -> list[Any]:
        self._say(name, value)
        while missing := self._missing(name):
            if self.failure_exit_code is not None:
                raise PeerFailed(f"{_named(missing)} did not answer")
            signs.see({n: self._beat_of(n) for n in missing})
            time.sleep(POLL_S)
        return [json.loads(self.store.get(f"{name}-{n}")) for n in range(self.size)]

    def _beat_of(self, number: int) -> int:
        return int(self.store.add(f"beat-{number}", 0))

    def leave(self) -> None:
        """Wait until all processes have called ``leave``, and destroy torch's process group."""
        self.exchange("end")
        self._over.set()
        self._say("left")
        if self.rank == 0:  # this process may host the store
            self._wait(lambda: not self._missing("left"))
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def exception_to_raise(self, error: Exception) -> BaseException:
        """Return the exception that this process must raise after ``error``. If this process
        reports the failure of the run, the result is the error to report. Otherwise, the result is
        SystemExit with the exit code of the process that reports the failure.
        """
        try:
            told = _within(REPORT_TIMEOUT_FACTOR * ANSWER_TIMEOUT_S, lambda: self._tell(error))
        except RuntimeError:  # the first process hosted the store, and has ended
            if self.failure_exit_code is None and not is_peer_lost(error):
                return error
            told = (
                peer_lost_error([0], error)
                if self.failure_exit_code is None and self.rank == 1
                else None
            )
        if told is not None:
            return told
        # A launcher stops all processes when the first one ends. So wait until the process that
        # reports the failure has written its report.
        time.sleep(ANSWER_TIMEOUT_S)
        return SystemExit(
            RetryError.exit_code if self.failure_exit_code is None else self.failure_exit_code
        )

    def _tell(self, error: Exception) -> Exception | None:
        """Agree with the other processes on the process that reports the failure. Return the error
        if this process must report it. Return None if another process reports the failure.
        """
        own_reason = not isinstance(error, StoppedError) and not is_peer_lost(error)
        # A process with a reason of its own claims the report before it answers. Otherwise, a
        # process that only lost its peer could see all answers and claim the report first.
        claimed = own_reason and self._claim_report()
        self._say("answer")
        if not own_reason:
            self._wait(lambda: not self._missing("answer") or self.failure_exit_code is not None)
            missing = self._missing("answer")
            if not isinstance(error, StoppedError):
                error = peer_lost_error(missing, error)
            elif missing:
                error.message += f"; {_named(missing)} did not answer"
            claimed = self.failure_exit_code is None and self._claim_report()
        if claimed:
            self._over.set()
            code = error.exit_code if isinstance(error, ToolkitError) else 70
            self.store.set("failed", json.dumps(code))
            self._wait(lambda: not set(self._missing("heard")) - {self.rank})
            return error
        self._wait(lambda: self.failure_exit_code is not None)
        return None

    def _claim_report(self) -> bool:
        """True if this process is the first that claims to report the failure."""
        return bool(self.store.add("told", 1) == 1)

    def _say(self, name: str, value: Any = None) -> None:
        self.store.set(f"{name}-{self.rank}", json.dumps(value))

    def _missing(self, name: str) -> list[int]:
        """The ranks of the processes that have not yet written ``name`` to the store."""
        return [n for n in range(self.size) if not self.store.check([f"{name}-{n}"])]

    def _listen(self) -> None:
        try:
            while not self._over.wait(LISTEN_INTERVAL_S):
                self.store.add(f"beat-{self.rank}", 1)
                if self.store.check(["failed"]):
                    self.failure_exit_code = json.loads(self.store.get("failed"))
                    self._say("heard")
                    return
        except RuntimeError:  # the process that hosts the store has ended
            return

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` is true, but at most ``ANSWER_TIMEOUT_S`` seconds."""
        end = time.monotonic() + ANSWER_TIMEOUT_S
        while not condition() and time.monotonic() < end:
            time.sleep(POLL_S)


class _SignsOfLife:
    """Records when each other process last showed a sign of life.

    The times come from a clock that pauses while this process is stopped (SIGSTOP), because all
    processes of a job may be stopped and continued together.
    """

    def __init__(self) -> None:
        self._seen = dict[int, tuple[int, float]]()
        self._clock_s = 0.0
        self._last_tick = time.monotonic()

    def tick(self) -> None:
        """Advance the clock. Call this method several times in every ``MAX_TICK_S`` seconds."""
        now = time.monotonic()
        self._clock_s += min(now - self._last_tick, MAX_TICK_S)
        self._last_tick = now

    def see(self, beats: dict[int, int]) -> None:
        """Record the time for each process whose counter has changed. ``beats`` contains the rank
        and the counter of each process to watch. All other processes are forgotten.
        """
        old = self._seen
        self._seen = {
            n: old[n] if n in old and old[n][0] == beat else (beat, self._clock_s)
            for n, beat in beats.items()
        }

    def silence_s(self) -> float:
        """Return the longest time in seconds for which a process has shown no sign of life."""
        return self._clock_s - min((when for _, when in self._seen.values()), default=0.0)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Run ``call`` in a thread, and return its result or raise its exception.

    If ``call`` does not end within ``seconds``, raise RuntimeError. The thread is not stopped.
    """
    outcome = _started(call)
    if not wait([outcome], seconds).done:
        raise RuntimeError("the store does not answer")
    return outcome.result()


def _started(call: Callable[[], T]) -> Future[T]:
    """Start ``call`` in a daemon thread, and return the future of its result."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - passed to the caller
            outcome.set_exception(error)

    threading.Thread(target=work, name="toolkit-telling", daemon=True).start()
    return outcome


def is_peer_lost(error: BaseException | None) -> bool:
    """True if ``error`` or one of its causes only means that another process does not answer or
    has run out of memory. The other process then reports the reason.
    """
    while error is not None:
        lost = type(error) is RuntimeError or isinstance(error, distributed.DistError)
        if isinstance(error, (PeerFailed, PeerOutOfMemoryError)) or (
            lost and _GONE.search(str(error))
        ):
            return True
        error = error.__cause__
    return False


def peer_lost_error(missing: Iterable[int], error: BaseException) -> ToolkitError:
    """Return an error which says that another process of the run has ended unexpectedly.
    ``missing`` are the ranks of the processes that did not answer. ``error`` is the exception in
    this process.
    """
    missing = list(missing)
    why = "" if isinstance(error, PeerFailed) else f" ({_line(error)})"
    return RetryError(
        (
            f"{_named(missing) if missing else 'another process'} of this run has ended "
            f"unexpectedly{why}"
        ),
        where=f"process {rank()}",
        fix="read the last output of that process, and check the node's log for an out-of-memory "
        "kill. Then run the same command again to resume from the last checkpoint. If the "
        "process was only slow, raise grpo.ddp_timeout",
    )


def _named(numbers: Iterable[int]) -> str:
    return "process " + ", ".join(map(str, numbers))


def _line(error: BaseException) -> str:
    """The first sentence of the message of ``error``. Gloo begins its messages with a location in
    its source code, which is removed.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S*\] ", "", line).split(". ")[0][:200]

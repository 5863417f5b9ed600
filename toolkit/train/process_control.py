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
from toolkit.engine.mesh import COLLECTIVE_TIMEOUT_S, create_default_group
from toolkit.engine.oom_agreement import PeerOutOfMemoryError

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
"""The most seconds that a tick of ``_Heartbeats`` counts. If two ticks are further apart, this
process was stopped (SIGSTOP) between them, and the rest of the time does not count.
"""
REPORT_TIMEOUT_FACTOR = 4
"""The time limit for reporting an error is ``REPORT_TIMEOUT_FACTOR`` x ``ANSWER_TIMEOUT_S``. It is
needed because a call of the store does not return while the process that hosts the store is
stopped.
"""
_PEER_LOST_PATTERN = re.compile(
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
    timeout = timedelta(seconds=timeout_s or COLLECTIVE_TIMEOUT_S)
    try:
        store, own_rank, size = next(rendezvous("env://", timeout=timeout))
        create_default_group(timeout_s, PrefixStore("group", store))
    except (RuntimeError, ValueError) as error:
        raise RetryError(
            (
                f"the {world_size()} processes of this run did not connect to each other: "
                f"{_first_sentence(error)}"
            ),
            where=f"process {rank()}, MASTER_ADDR={os.environ.get('MASTER_ADDR', '')}",
            fix="use torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as"
            " torchrun does",
        ) from error
    return Peers(PrefixStore("toolkit", store), own_rank, size, timeout.total_seconds())


class Peers:
    """Exchanges messages with the other processes of the run through the key-value ``store``.

    A thread reads from the store whether another process has failed. The thread also increments a
    counter of this process in the store, as a sign of life. If the counter of a process does not
    change for ``timeout_s`` seconds (``grpo.ddp_timeout``), the other processes no longer wait for
    that process.
    """

    def __init__(
        self, store: Any, own_rank: int, size: int, timeout_s: float = COLLECTIVE_TIMEOUT_S
    ) -> None:
        self.store, self.rank, self.size = store, own_rank, size
        self.timeout_s = timeout_s
        self.failure_exit_code: int | None = None
        self._done = threading.Event()
        threading.Thread(target=self._listen, name="toolkit-peers", daemon=True).start()

    def exchange(self, name: str, value: object = None) -> list[Any]:
        """Send ``value`` (a JSON value) to all processes under the key ``name``. Wait for their
        values, and return the values of all processes, by rank. There is no time limit while the
        other processes show signs of life.

        Raises:
            PeerFailed: another process has failed, or shows no sign of life.
        """
        heartbeats = _Heartbeats()
        # In a thread, because a call of the store does not return while the process that hosts the
        # store is stopped.
        outcome = _run_in_thread(lambda: self._exchange(name, value, heartbeats))
        while not wait([outcome], POLL_S).done:
            heartbeats.tick()
            if heartbeats.silence_s() > self.timeout_s:
                raise PeerFailed(f"a process showed no sign of life for {self.timeout_s:g} s")
        return outcome.result()

    def _exchange(self, name: str, value: object, heartbeats: _Heartbeats) -> list[Any]:
        self._post(name, value)
        while missing_ranks := self._ranks_without(name):
            if self.failure_exit_code is not None:
                raise PeerFailed(f"{_process_list(missing_ranks)} did not answer")
            heartbeats.record({n: self._heartbeat_of(n) for n in missing_ranks})
            time.sleep(POLL_S)
        return [json.loads(self.store.get(f"{name}-{n}")) for n in range(self.size)]

    def _heartbeat_of(self, peer_rank: int) -> int:
        return int(self.store.add(f"beat-{peer_rank}", 0))

    def leave_group(self) -> None:
        """Wait until all processes have called this method, and destroy torch's process group."""
        self.exchange("end")
        self._done.set()
        self._post("left")
        if self.rank == 0:  # this process may host the store
            self._wait_for_answers(lambda: not self._ranks_without("left"))
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def exception_to_raise(self, error: Exception) -> BaseException:
        """Return the exception that this process must raise after ``error``. If this process
        reports the failure of the run, the result is the error to report. Otherwise, the result is
        SystemExit with the exit code of the process that reports the failure.
        """
        try:
            error_to_report = _call_with_timeout(
                REPORT_TIMEOUT_FACTOR * ANSWER_TIMEOUT_S, lambda: self._agree_on_report(error)
            )
        except RuntimeError:  # the first process hosted the store, and has ended
            if self.failure_exit_code is None and not is_peer_lost(error):
                return error
            error_to_report = (
                peer_lost_error([0], error)
                if self.failure_exit_code is None and self.rank == 1
                else None
            )
        if error_to_report is not None:
            return error_to_report
        # A launcher stops all processes when the first one ends. So wait until the process that
        # reports the failure has written its report.
        time.sleep(ANSWER_TIMEOUT_S)
        return SystemExit(
            RetryError.exit_code if self.failure_exit_code is None else self.failure_exit_code
        )

    def _agree_on_report(self, error: Exception) -> Exception | None:
        """Agree with the other processes on the process that reports the failure. Return the error
        if this process must report it. Return None if another process reports the failure.
        """
        has_own_reason = not isinstance(error, StoppedError) and not is_peer_lost(error)
        # A process with a reason of its own claims the report before it answers. Otherwise, a
        # process that only lost its peer could see all answers and claim the report first.
        is_reporter = has_own_reason and self._claim_report()
        self._post("answer")
        if not has_own_reason:
            self._wait_for_answers(
                lambda: not self._ranks_without("answer") or self.failure_exit_code is not None
            )
            missing_ranks = self._ranks_without("answer")
            if not isinstance(error, StoppedError):
                error = peer_lost_error(missing_ranks, error)
            elif missing_ranks:
                error.message += f"; {_process_list(missing_ranks)} did not answer"
            is_reporter = self.failure_exit_code is None and self._claim_report()
        if is_reporter:
            self._done.set()
            exit_code = error.exit_code if isinstance(error, ToolkitError) else 70
            self.store.set("failed", json.dumps(exit_code))
            self._wait_for_answers(lambda: not set(self._ranks_without("heard")) - {self.rank})
            return error
        self._wait_for_answers(lambda: self.failure_exit_code is not None)
        return None

    def _claim_report(self) -> bool:
        """Claim the right to report the failure. Return True if this process is the first that
        claims it.
        """
        return bool(self.store.add("told", 1) == 1)

    def _post(self, name: str, value: object = None) -> None:
        self.store.set(f"{name}-{self.rank}", json.dumps(value))

    def _ranks_without(self, name: str) -> list[int]:
        """The ranks of the processes that have not yet written ``name`` to the store."""
        return [n for n in range(self.size) if not self.store.check([f"{name}-{n}"])]

    def _listen(self) -> None:
        try:
            while not self._done.wait(LISTEN_INTERVAL_S):
                self.store.add(f"beat-{self.rank}", 1)
                if self.store.check(["failed"]):
                    self.failure_exit_code = json.loads(self.store.get("failed"))
                    self._post("heard")
                    return
        except RuntimeError:  # the process that hosts the store has ended
            return

    def _wait_for_answers(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` is true, but at most ``ANSWER_TIMEOUT_S`` seconds."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while not condition() and time.monotonic() < deadline:
            time.sleep(POLL_S)


class _Heartbeats:
    """Records when each other process last showed a sign of life.

    The times come from a clock that pauses while this process is stopped (SIGSTOP). All processes
    of a job may be stopped and continued together. The time of such a stop does not count as
    silence of the other processes.
    """

    def __init__(self) -> None:
        self._last_changes = dict[int, tuple[int, float]]()
        self._clock_s = 0.0
        self._last_tick = time.monotonic()

    def tick(self) -> None:
        """Advance the clock. Call this method several times in every ``MAX_TICK_S`` seconds."""
        now = time.monotonic()
        self._clock_s += min(now - self._last_tick, MAX_TICK_S)
        self._last_tick = now

    def record(self, counters: dict[int, int]) -> None:
        """If the counter of a process has changed, record the clock's current time as the last sign
        of life of this process. ``counters`` has the counter of each watched process, by rank. A
        process that is not in ``counters`` is forgotten.
        """
        previous = self._last_changes
        self._last_changes = {
            n: previous[n]
            if n in previous and previous[n][0] == counter
            else (counter, self._clock_s)
            for n, counter in counters.items()
        }

    def silence_s(self) -> float:
        """Return how many seconds ago the most silent process last showed a sign of life."""
        return self._clock_s - min(
            (changed_s for _, changed_s in self._last_changes.values()), default=0.0
        )


def _call_with_timeout(seconds: float, call: Callable[[], T]) -> T:
    """Run ``call`` in a thread, and return its result or raise its exception.

    If ``call`` does not end within ``seconds``, raise RuntimeError. The thread is not stopped.
    """
    outcome = _run_in_thread(call)
    if not wait([outcome], seconds).done:
        raise RuntimeError("the store does not answer")
    return outcome.result()


def _run_in_thread(call: Callable[[], T]) -> Future[T]:
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
    """True if ``error`` or one of its causes says that another process does not answer or has run
    out of memory. In this case this process has no reason to report, but the other process has.
    """
    while error is not None:
        is_connection_error = type(error) is RuntimeError or isinstance(
            error, distributed.DistError
        )
        if isinstance(error, (PeerFailed, PeerOutOfMemoryError)) or (
            is_connection_error and _PEER_LOST_PATTERN.search(str(error))
        ):
            return True
        error = error.__cause__
    return False


def peer_lost_error(missing_ranks: Iterable[int], error: BaseException) -> ToolkitError:
    """Return an error which says that another process of the run has ended unexpectedly.
    ``missing_ranks`` are the ranks of the processes that did not answer. ``error`` is the exception
    in this process.
    """
    missing_ranks = list(missing_ranks)
    detail = "" if isinstance(error, PeerFailed) else f" ({_first_sentence(error)})"
    return RetryError(
        (
            f"{_process_list(missing_ranks) if missing_ranks else 'another process'} of this run "
            f"has ended unexpectedly{detail}"
        ),
        where=f"process {rank()}",
        fix="read the last output of that process, and check the node's log for an out-of-memory "
        "kill. Then run the same command again to resume from the last checkpoint. If the "
        "process was only slow, raise grpo.ddp_timeout",
    )


def _process_list(ranks: Iterable[int]) -> str:
    return "process " + ", ".join(map(str, ranks))


def _first_sentence(error: BaseException) -> str:
    """The first sentence of the message of ``error``. Gloo begins its messages with a location in
    its source code, which is removed.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S*\] ", "", line).split(". ")[0][:200]

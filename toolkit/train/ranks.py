"""The processes of one run: which one this is, and what they tell each other beside training.

They train together through torch's collectives; what has to reach a process whose partner may be
gone goes through the key-value store that they met at. So one of them tells a failure, the others
keep quiet and end with its code.
"""

from __future__ import annotations

import json
import os
import re
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from toolkit.base.errors import RetryError, StoppedError, ToolkitError
from toolkit.engine.ranks import TIMEOUT_S, join_group, world_size

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["PeerFailed", "Peers", "is_first_rank", "join", "rank", "world_size"]

POLL_S = 0.05
ANSWER_S = 3.0
"""How long the one that tells may take, and those that are still there to say so."""
_GONE = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection (?:was )?(?:closed|refused|reset)"
    r"|remote process exited|ncclRemoteError|gloo.*(?:read|write) error|socket timeout|timed out"
    r" waiting|collective operation timeout",
    re.I | re.S,
)


def rank() -> int:
    """The number of this process among them, as the launcher says."""
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """True for the process that writes."""
    return rank() == 0


class PeerFailed(Exception):
    """Another process has told why it ended."""


def join(timeout_s: float | None = None) -> Peers | None:
    """Meet the other processes of the run; None where there are none.

    Raises:
        RetryError: they did not come.
    """
    if world_size() == 1:
        return None
    patience = timedelta(seconds=timeout_s or TIMEOUT_S)
    try:
        store, number, size = next(rendezvous("env://", timeout=patience))
        join_group(timeout_s, PrefixStore("group", store))
    except (RuntimeError, ValueError) as problem:
        raise RetryError(
            f"the {world_size()} processes of this run did not meet: {_line(problem)}",
            where=f"process {rank()}, MASTER_ADDR={os.environ.get('MASTER_ADDR', '')}",
            fix="start it with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as"
            " torchrun does",
        ) from problem
    return Peers(PrefixStore("toolkit", store), number, size)


class Peers:
    """The other processes of the run, reached through ``store``."""

    def __init__(self, store: Any, number: int, size: int) -> None:
        self.store, self.number, self.size = store, number, size

    def exchange(self, name: str, value: Any = None) -> list[Any]:
        """What each process gave under ``name`` (JSON), by its number. Waits for all of them.

        Raises:
            PeerFailed: one of them has failed.
        """
        self.store.set(f"{name}-{self.number}", json.dumps(value))
        keys = [f"{name}-{number}" for number in range(self.size)]
        while not self.store.check(keys):
            if self.store.check(["failed"]):
                raise PeerFailed
            time.sleep(POLL_S)
        return [json.loads(self.store.get(key)) for key in keys]

    def ending(self, error: Exception) -> BaseException:
        """What this process ends with: an error, if it is the one that tells, else the exit with
        the code of the one that does.
        """
        try:
            return self._ending(error)
        except RuntimeError:  # the store went with the first process, which held it
            if not is_gone(error):
                return error
            return gone([0], error) if self.number == 1 else SystemExit(RetryError.exit_code)

    def leave(self) -> None:
        """All have come to the end."""
        self.exchange("end")
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def _ending(self, error: Exception) -> BaseException:
        self.store.set(f"answer-{self.number}", "")
        lost = is_gone(error)
        if lost or isinstance(error, StoppedError):
            missing = self._missing()
            if isinstance(error, StoppedError) and missing:
                error.message += f"; {_named(missing)} did not answer"
            elif lost:
                error = gone(missing, error)
        if not self.store.check(["failed"]) and self.store.add("told", 1) == 1:
            code = error.exit_code if isinstance(error, ToolkitError) else 70
            self.store.set("failed", json.dumps(code))
            return error
        end = time.monotonic() + ANSWER_S
        while not self.store.check(["failed"]) and time.monotonic() < end:
            time.sleep(POLL_S)
        # The first process that ends makes a launcher end the others: it should have told by then.
        time.sleep(ANSWER_S)
        told = self.store.check(["failed"])
        return SystemExit(json.loads(self.store.get("failed")) if told else RetryError.exit_code)

    def _missing(self) -> list[int]:
        """Those that have not said that they end too, after some time, unless one has told why."""
        end = time.monotonic() + ANSWER_S
        while True:
            missing = [n for n in range(self.size) if not self.store.check([f"answer-{n}"])]
            if not missing or self.store.check(["failed"]) or time.monotonic() > end:
                return missing
            time.sleep(POLL_S)


def is_gone(error: BaseException) -> bool:
    """True where the error says no more than that another process does not answer."""
    if isinstance(error, PeerFailed):
        return True
    return isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))


def gone(missing: Iterable[int], error: BaseException) -> ToolkitError:
    """The error of a process that waits for one that is no more."""
    missing = list(missing)
    why = "" if isinstance(error, PeerFailed) else f" ({_line(error)})"
    return RetryError(
        f"{_named(missing) if missing else 'another process'} of this run is gone{why}",
        where=f"process {rank()}",
        fix="see what it wrote last, and whether the node's log has it killed for memory; start the"
        " same command again: it resumes from the last checkpoint. If it was only slow, raise"
        " grpo.ddp_timeout",
    )


def _named(numbers: Iterable[int]) -> str:
    return "process " + ", ".join(map(str, numbers))


def _line(error: BaseException) -> str:
    """The first sentence, without the place in gloo's source that it begins with."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S*\] ", "", line).split(". ")[0][:200]

"""Make processes that share a model act together when one of them runs out of memory.

If a process repeated its work alone, the others would wait in a collective that it never joins. So
all of them repeat, or none does. They agree over the group's CPU connection, never over the
connection that transfers tensors.

* In a watched phase (a training step) the processes agree before each collective of the group. A
  process that runs out of memory reports that in the agreement that the others reach next. At that
  point all have made the same collectives, and all repeat the phase.
* The collectives inside vLLM cannot be watched. There the processes agree after the call: if all
  return, with a result or out of memory, all repeat it. If one of them stays in a collective, the
  process that failed gets no answer within ``ANSWER_S``, and the run ends.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from toolkit.base.errors import ConfigError, first_line
from toolkit.base.process_environment import rank
from toolkit.engine.mesh import mesh
from toolkit.engine.oom_backoff import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from toolkit.engine.mesh import Mesh

T = TypeVar("T")

ANSWER_S = 60.0
"""Seconds that a process that ran out of memory waits for the others to answer."""

_watched = False


class OutOfMemoryElsewhere(RuntimeError):
    """Raised if another process of the group ran out of memory, so that all repeat the same
    work.
    """


def watch() -> None:
    """Make each collective of the group wait for an agreement, until the ``phase`` ends. Every
    process of the group must call this function at the same point.
    """
    global _watched
    _watched = mesh() is not None


@contextmanager
def phase() -> Iterator[None]:
    """Surround work that can be repeated. If a process runs out of memory after ``watch``, all
    processes of the group leave with an out-of-memory error.

    Raises:
        OutOfMemoryElsewhere: another process ran out of memory.
        ConfigError: this process ran out of memory, and the others do not answer.
    """
    global _watched
    try:
        yield
        before_collective()
    except (RuntimeError, MemoryError) as error:
        shared = mesh()
        own = is_out_of_memory(error) and not isinstance(error, OutOfMemoryElsewhere)
        if _watched and shared is not None and own:
            _answer(shared, error, "a training step")
        raise
    finally:
        _watched = False


def before_collective() -> None:
    """Agree with the other processes of the group that all make the next collective. Does nothing
    outside of a watched phase.

    Raises:
        OutOfMemoryElsewhere: another process ran out of memory instead.
    """
    shared = mesh()
    if not _watched or shared is None:
        return
    if failed := _largest_flag(shared, 0):
        raise _elsewhere(shared, failed)


def drawn_together(shared: Mesh, draw: Callable[[], T]) -> T:
    """Return the result of ``draw()``, a call of the engine in every process of the group. Out of
    memory in one process is raised in all.

    Raises:
        OutOfMemoryElsewhere: another process ran out of memory.
        ConfigError: this process ran out of memory, and the others do not answer.
    """
    try:
        result = draw()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            _answer(shared, error, "a rollout")
        raise
    if failed := _largest_flag(shared, 0):
        raise _elsewhere(shared, failed)
    return result


def _answer(shared: Mesh, error: BaseException, during: str) -> None:
    """Report to the other processes that this one ran out of memory. Returns after all have
    reported their state.
    """
    try:
        if not _idle():
            raise RuntimeError("a collective of this process does not end")
        _largest_flag(shared, shared.rank + 1, timedelta(seconds=ANSWER_S))
    except RuntimeError as lost:
        raise ConfigError(
            f"process {rank()} ran out of memory during {during}, and the other processes that "
            f"share its model wait for it in the middle of a sum: {first_line(error)}",
            where=f"process {rank()}",
            fix="set model.tensor_parallel_size to a larger number, or lower "
            "grpo.per_device_train_batch_size, grpo.max_completion_length or model.max_num_seqs "
            "(`envcheck size` shows the memory of each), then run the same command again: it "
            "resumes from the last checkpoint",
        ) from lost


def _idle() -> bool:
    """Whether the GPU has completed all work of this process. Then the other processes have also
    made every collective that this process started.
    """
    cuda: Any = torch.cuda  # torch.cuda has no types
    if not cuda.is_initialized():
        return True  # a collective on the CPU is complete when it returns
    asked = cuda.Event()
    asked.record()
    end = time.monotonic() + ANSWER_S
    while not asked.query():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _largest_flag(shared: Mesh, flag: int, patience: timedelta | None = None) -> int:
    flags = torch.tensor([flag])
    work = distributed.all_reduce(
        flags, op=distributed.ReduceOp.MAX, group=shared.host_group, async_op=True
    )
    assert work is not None
    if patience is None:
        work.wait()
    else:
        work.wait(patience)
    return int(flags)


def _elsewhere(shared: Mesh, flag: int) -> OutOfMemoryElsewhere:
    number = shared.replica * shared.size + flag - 1
    return OutOfMemoryElsewhere(f"process {number} ran out of memory")

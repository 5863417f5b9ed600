"""What processes that share a model decide together when one of them runs out of memory.

A process that repeats its work alone leaves the others in a collective that it never joins, so all
of them repeat or none does. They agree over the group's host side, never over the group that
carries tensors.

* In a watched phase (a training step) the processes agree before each collective of the group. A
  process that runs out of memory answers the agreement that the others reach next. All have then
  made the same collectives, and all repeat the phase.
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
"""How long a process that ran out of memory waits for the others to answer."""

_watched = False


class OutOfMemoryElsewhere(RuntimeError):
    """Another process of the group ran out of memory, and all repeat what they did."""


def watch() -> None:
    """From here to the end of the ``phase`` each collective of the group is preceded by an
    agreement. Every process of the group calls it at the same point.
    """
    global _watched
    _watched = mesh() is not None


@contextmanager
def phase() -> Iterator[None]:
    """Around work that can be repeated. If a process runs out of memory after ``watch``, all
    processes of the group leave with an out-of-memory error.

    Raises:
        OutOfMemoryElsewhere: another process ran out of memory.
        ConfigError: this one did, and the others do not answer.
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
    """Agree that every process of the group makes the next collective. Does nothing outside of a
    watched phase.

    Raises:
        OutOfMemoryElsewhere: one of them ran out of memory instead.
    """
    shared = mesh()
    if not _watched or shared is None:
        return
    if failed := _largest_flag(shared, 0):
        raise _elsewhere(shared, failed)


def drawn_together(shared: Mesh, draw: Callable[[], T]) -> T:
    """``draw()``, a call of the engine in every process of the group. Out of memory in one of them
    is raised in all.

    Raises:
        OutOfMemoryElsewhere: another process ran out of memory.
        ConfigError: this one did, and the others do not answer.
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
    """Tell the others that this process ran out of memory; returns once all have told."""
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
    """Whether the GPU has done all that this process asked of it: then every collective that it
    began has been made by the others too.
    """
    cuda: Any = torch.cuda  # which has no types
    if not cuda.is_initialized():
        return True  # a collective of the CPU has ended when it returns
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

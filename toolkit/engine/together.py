"""Make all processes that share a model repeat their work if one of them runs out of memory.

If one process repeated its work alone, the other processes would wait forever in a collective call
(such as an all-reduce) that this process never joins. So either all processes of the group repeat
the work, or none does. To agree on this, each process sends a flag: whether it ran out of memory.
Flags are sent over the group's CPU connection, never over the connection that transfers tensors.

* In a training step, the processes exchange flags before each collective call of the group. If a
  process runs out of memory, the others learn this at their next exchange. At that point all
  processes have made the same collective calls, and all repeat the step.
* In a rollout, the collective calls are inside vLLM, so no flags can be exchanged before them.
  Instead the processes exchange flags after vLLM's call. If one process ran out of memory and
  vLLM's call has ended in all other processes, all processes repeat the call. If another process
  still waits in a collective call, it sends no flag. The process that ran out of memory waits
  ``ANSWER_S`` for the flags, and then the run ends with an error.
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
"""The seconds that a process which ran out of memory waits for the other processes."""

_watched = False


class OutOfMemoryElsewhere(RuntimeError):
    """Raised in a process if another process of its group ran out of memory. All processes of the
    group then repeat the work.
    """


def watch() -> None:
    """Begin to exchange flags before each collective call, until the current ``phase`` ends. With
    its flag, each process tells the other processes of the group whether it ran out of memory.
    Every process of the group must call this function at the same point.
    """
    global _watched
    _watched = mesh() is not None


@contextmanager
def phase() -> Iterator[None]:
    """A context manager for work that can be repeated. If one process runs out of memory in the
    block after it has called ``watch``, an out-of-memory error is raised in all processes of the
    group.

    Raises:
        OutOfMemoryElsewhere: another process ran out of memory.
        ConfigError: this process ran out of memory, and the other processes do not answer,
            because they wait in a collective call.
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
    """Before a collective call, find out whether a process of the group ran out of memory. Every
    process of the group reports to the others. Does nothing if ``watch`` was not called since the
    current ``phase`` (the block of work that can be repeated) began.

    Raises:
        OutOfMemoryElsewhere: another process ran out of memory, so it will not join the collective
            call.
    """
    shared = mesh()
    if not _watched or shared is None:
        return
    if failed := _largest_flag(shared, 0):
        raise _elsewhere(shared, failed)


def drawn_together(shared: Mesh, draw: Callable[[], T]) -> T:
    """Return the result of ``draw()``. Every process of the group must call this function. If one
    process runs out of memory, an out-of-memory error is raised in all processes of the group.

    Raises:
        OutOfMemoryElsewhere: another process ran out of memory.
        ConfigError: this process ran out of memory, and the other processes do not answer,
            because they wait in a collective call.
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
    """Report to the other processes of the group that this process ran out of memory, and wait
    until all of them have reported too.

    Raises:
        ConfigError: another process does not report within ``ANSWER_S``.
    """
    try:
        if not _idle():
            raise RuntimeError(
                f"a collective call of this process does not end within {ANSWER_S:g} s"
            )
        _largest_flag(shared, shared.rank + 1, timedelta(seconds=ANSWER_S))
    except RuntimeError as lost:
        raise ConfigError(
            f"process {rank()} ran out of memory during {during} ({first_line(error)}). The work "
            "cannot be repeated, because the other processes that share its model wait for it "
            "in a collective call",
            where=f"process {rank()}",
            fix="set `model.tensor_parallel_size` to a larger number, or lower "
            "`grpo.per_device_train_batch_size`, `grpo.max_completion_length` or "
            "`model.max_num_seqs`. `envcheck size` shows how much memory each of these keys "
            "needs. Then run the same command again. The run resumes from the last "
            "checkpoint",
        ) from lost


def _idle() -> bool:
    """Wait until the GPU has completed all work of this process, but at most ``ANSWER_S``. Returns
    True if all work is complete, else False.

    If the result is True, every collective call that this process started is complete. So the other
    processes have joined these calls.
    """
    cuda: Any = torch.cuda  # torch.cuda has no types
    if not cuda.is_initialized():
        return True  # a collective call on the CPU is complete when it returns
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

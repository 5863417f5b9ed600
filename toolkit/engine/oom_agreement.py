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
  ``PEER_TIMEOUT_S`` for the flags, and then the run ends with an error.
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
from toolkit.engine.mesh import current_mesh
from toolkit.engine.oom_backoff import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from toolkit.engine.mesh import Mesh

T = TypeVar("T")

PEER_TIMEOUT_S = 60.0
"""The seconds that a process which ran out of memory waits for the other processes."""

_is_watching = False


class PeerOutOfMemoryError(RuntimeError):
    """Raised in a process if another process of its group ran out of memory. All processes of the
    group then repeat the work.
    """


def watch_peers() -> None:
    """From now until the current ``repeatable_phase`` ends, the processes of the group exchange
    flags before each collective call. The flag of a process says whether this process ran out of
    memory. Every process of the group must call this function at the same point.
    """
    global _is_watching
    _is_watching = current_mesh() is not None


@contextmanager
def repeatable_phase() -> Iterator[None]:
    """A context manager for work that can be repeated. If one process runs out of memory
    between a call of ``watch_peers`` in the block and the end of the block, an out-of-memory error
    is raised in all processes of the group.

    Raises:
        PeerOutOfMemoryError: another process ran out of memory.
        ConfigError: this process ran out of memory, and the other processes do not answer,
            because they wait in a collective call.
    """
    global _is_watching
    try:
        yield
        check_peers()
    except (RuntimeError, MemoryError) as error:
        mesh = current_mesh()
        is_own_failure = is_out_of_memory(error) and not isinstance(error, PeerOutOfMemoryError)
        if _is_watching and mesh is not None and is_own_failure:
            _report_out_of_memory(mesh, error, "a training step")
        raise
    finally:
        _is_watching = False


def check_peers() -> None:
    """Before a collective call, find out whether a process of the group ran out of memory. Every
    process of the group reports to the others. Does nothing if ``watch_peers`` was not called since
    the current ``repeatable_phase`` (the block of work that can be repeated) began.

    Raises:
        PeerOutOfMemoryError: another process ran out of memory, so it will not join the collective
            call.
    """
    mesh = current_mesh()
    if not _is_watching or mesh is None:
        return
    if failed := _max_flag(mesh, 0):
        raise _peer_out_of_memory_error(mesh, failed)


def generate_together(mesh: Mesh, generate: Callable[[], T]) -> T:
    """Return the result of ``generate()``. Every process of the group must call this function. If
    one process runs out of memory, an out-of-memory error is raised in all processes of the group.

    Raises:
        PeerOutOfMemoryError: another process ran out of memory.
        ConfigError: this process ran out of memory, and the other processes do not answer,
            because they wait in a collective call.
    """
    try:
        result = generate()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            _report_out_of_memory(mesh, error, "a rollout")
        raise
    if failed := _max_flag(mesh, 0):
        raise _peer_out_of_memory_error(mesh, failed)
    return result


def _report_out_of_memory(mesh: Mesh, error: BaseException, phase: str) -> None:
    """Report to the other processes of the group that this process ran out of memory, and wait
    until all of them have reported too.

    Raises:
        ConfigError: another process does not report within ``PEER_TIMEOUT_S``.
    """
    try:
        if not _wait_for_gpu():
            raise RuntimeError(
                f"a collective call of this process does not end within {PEER_TIMEOUT_S:g} s"
            )
        _max_flag(mesh, mesh.rank + 1, timedelta(seconds=PEER_TIMEOUT_S))
    except RuntimeError as timeout_error:
        raise ConfigError(
            f"process {rank()} ran out of memory during {phase} ({first_line(error)}). The work "
            "cannot be repeated, because the other processes that share its model wait for it "
            "in a collective call",
            where=f"process {rank()}",
            fix="set `model.tensor_parallel_size` to a larger number, or lower "
            "`grpo.per_device_train_batch_size`, `grpo.max_completion_length` or "
            "`model.max_num_seqs`. `envcheck size` shows how much memory each of these keys "
            "needs. Then run the same command again. The run resumes from the last "
            "checkpoint",
        ) from timeout_error


def _wait_for_gpu() -> bool:
    """Wait until the GPU has completed all work of this process, but at most ``PEER_TIMEOUT_S``.
    Returns True if all work is complete, else False.

    If the result is True, every collective call that this process started is complete. So the other
    processes have joined these calls.
    """
    cuda: Any = torch.cuda  # torch.cuda has no types
    if not cuda.is_initialized():
        return True  # a collective call on the CPU is complete when it returns
    event = cuda.Event()
    event.record()
    deadline = time.monotonic() + PEER_TIMEOUT_S
    while not event.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _max_flag(mesh: Mesh, flag: int, timeout: timedelta | None = None) -> int:
    flags = torch.tensor([flag])
    work = distributed.all_reduce(
        flags, op=distributed.ReduceOp.MAX, group=mesh.host_group, async_op=True
    )
    assert work is not None
    if timeout is None:
        work.wait()
    else:
        work.wait(timeout)
    return int(flags)


def _peer_out_of_memory_error(mesh: Mesh, flag: int) -> PeerOutOfMemoryError:
    failed_rank = mesh.replica * mesh.size + flag - 1
    return PeerOutOfMemoryError(f"process {failed_rank} ran out of memory")

"""``toolkit train --nproc-per-node N``: start the processes of this node and return one exit code.

torchrun can also start the processes, but it exits with code 1 if any process fails. A scheduler
then cannot see exit code 75, which means that the run was stopped and should be queued again. This
module does not import torch. Only the processes that it starts import torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from toolkit.base.errors import InputError, StoppedError
from toolkit.base.process_environment import node_count, node_rank
from toolkit.train.checkpointing.stop_signals import SIGNALS, handled_signals, notify_shutdown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

Child = subprocess.Popen[bytes]
LAUNCHER_PID_VARIABLE = "TOOLKIT_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 0.1
GRACE_PERIOD_S = 30.0
"""Seconds from the failure of one process until the other processes get SIGTERM, and from then
until they get SIGKILL.
"""


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``toolkit ARGUMENTS`` in ``processes`` processes on this node, which train together. Wait
    until all of them have ended, and return one exit code.

    If a process exits with a code above 0, the result is the first such code. Otherwise, if a
    signal killed a process, the result is 128 + the number of the signal. Otherwise, the result is
    0. If this process receives a signal, it sends the signal to every process that it started.

    Raises:
        StoppedError: a signal arrived before the started processes handled signals.
        OSError: a process could not be started.
    """
    port, children = free_port(), list[Child]()
    received_signals, pending_signals = list[int](), list[int]()

    def forward_signal(signal_number: int, frame: FrameType | None) -> None:
        del frame
        received_signals.append(signal_number)
        if len(children) < processes:
            pending_signals.append(signal_number)
        else:
            _send_signal(children, signal_number)

    with _signal_handler_installed(forward_signal, received_signals):
        for local_rank in range(processes):
            child = subprocess.Popen(
                [sys.executable, "-m", "toolkit", *arguments],
                env=child_environment(local_rank, processes, port),
                stdin=subprocess.DEVNULL,
                # Ctrl-C on a terminal reaches the whole session, and the launcher passes it on.
                # In a session of its own, the process gets it only once.
                start_new_session=True,
            )
            children.append(child)
        for signal_number in pending_signals:
            _send_signal(children, signal_number)
        exit_code = _wait_for_exit_code(children)
    signal_number = exit_code - 128
    # A second Ctrl-C ends a run at once.
    interrupted_twice = received_signals.count(signal.SIGINT) > 1
    if signal_number in SIGNALS and signal_number in received_signals and not interrupted_twice:
        raise stopped_early_error(signal.Signals(signal_number).name)
    return exit_code


def stopped_early_error(signal_name: str) -> StoppedError:
    """Return the error for a run that the signal ``signal_name`` stopped before the run began."""
    return StoppedError(
        f"stopped by {signal_name} before the run began", fix="run the same command again"
    )


def end_with_launcher() -> None:
    """Set the signal handling of a process that ``launch`` started. It applies until the run
    installs its own signal handlers.

    A signal ends the process without a message, because the launcher reports the signal. When the
    launcher ends, the kernel sends SIGTERM to the process (prctl(2), PR_SET_PDEATHSIG).
    """
    launcher = os.environ.pop(
        LAUNCHER_PID_VARIABLE, None
    )  # applies to this process, not to its children
    if launcher is None or sys.platform != "linux":
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # the launcher ended before the prctl call
        os.kill(os.getpid(), signal.SIGTERM)


def child_environment(local_rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for process ``local_rank`` of the
    ``processes`` on this node. PET_NNODES is the number of nodes. With several nodes, all processes
    connect to MASTER_ADDR and MASTER_PORT.

    Raises:
        InputError: there are several nodes but no MASTER_ADDR or MASTER_PORT, or PET_NODE_RANK is
            too large.
    """
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    nodes, own_node_rank = node_count(), node_rank()
    if nodes > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise InputError(
            f"MASTER_ADDR or MASTER_PORT is not set. The processes of {nodes} nodes (PET_NNODES) "
            "need this address to connect to each other",
            where="the environment",
            fix="on all nodes, set MASTER_ADDR to the host name of the first node and MASTER_PORT "
            "to a free port of the first node. To train on one node, unset PET_NNODES",
        )
    if own_node_rank >= nodes:
        raise InputError(
            f"PET_NODE_RANK={own_node_rank} must be below PET_NNODES={nodes}",
            where="the environment",
            fix=f"set PET_NODE_RANK to the number of this node, from 0 to {nodes - 1}",
        )
    if nodes > 1:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    else:
        host = "127.0.0.1"
    return {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "RANK": str(own_node_rank * processes + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(nodes * processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        LAUNCHER_PID_VARIABLE: str(os.getpid()),
    }


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _signal_handler_installed(
    handler: Callable[[int, FrameType | None], None], received_signals: list[int]
) -> Iterator[None]:
    previous_handlers = {number: signal.signal(number, handler) for number in handled_signals()}
    try:
        yield
    finally:
        if received_signals:
            notify_shutdown(previous_handlers.values())
        for number, previous_handler in previous_handlers.items():
            signal.signal(number, previous_handler)


def _wait_for_exit_code(children: Sequence[Child]) -> int:
    """Wait until all processes have ended, and return the exit code of ``launch``. If a process
    fails, the other processes have ``GRACE_PERIOD_S`` seconds to end. After that, they are stopped.
    """
    exit_codes: list[int] = []
    running = list(children)
    signals_to_send: list[int] = [signal.SIGTERM, signal.SIGKILL]
    deadline: float | None = None
    while running:
        ended = [child for child in running if child.poll() is not None]
        exit_codes += [child.returncode for child in ended]
        running = [child for child in running if child not in ended]
        if deadline is None and any(exit_codes):
            deadline = time.monotonic() + GRACE_PERIOD_S
        if deadline is not None and time.monotonic() > deadline and signals_to_send:
            _send_signal(running, signals_to_send.pop(0))
            deadline = time.monotonic() + GRACE_PERIOD_S
        time.sleep(0 if ended else POLL_S)
    first_failure = next((code for code in exit_codes if code > 0), 0)
    first_signal = next((128 - code for code in exit_codes if code < 0), 0)
    return first_failure or first_signal


def _send_signal(children: Sequence[Child], signal_number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(signal_number)

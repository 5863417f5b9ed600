"""Start the reward worker process when it is needed, and kill it if it does not answer.

The worker is a new interpreter and not a fork, because a fork of a process that uses CUDA or vLLM
does not work.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.base import errors
from toolkit.base.errors import ConfigError, ToolkitError
from toolkit.base.time_limits import OutOfTime
from toolkit.train.rewards import worker_channel
from toolkit.train.rewards.worker_replies import is_valid

START_CODE = (
    "import sys; sys.path[:] = sys.argv[4:];"
    " from toolkit.train.rewards.worker import main; main(*map(int, sys.argv[1:4]))"
)
OTHER_PYTHON_START_CODE = (
    "import sys, importlib.util as u; root = sys.argv[4];"
    " s = u.spec_from_file_location('toolkit', root + '/__init__.py',"
    " submodule_search_locations=[root]); m = sys.modules['toolkit'] = u.module_from_spec(s);"
    " s.loader.exec_module(m);"
    " from toolkit.train.rewards.worker import main; main(*map(int, sys.argv[1:4]))"
)
_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]
INVALID_REPLY = "sent an invalid reply from its process"
_EXIT_LIMIT_S = 5.0  # the time limit for exit handlers of the worker
_RELOAD_LIMIT_S = 600.0  # the time limit for loading all functions again after a restart


class Workers(NamedTuple):
    """The worker processes of a run. ``rewards`` runs rewards and tools. ``environment`` runs the
    environment.

    Both are the same process unless the run file sets a Python interpreter for the environment.
    """

    rewards: WorkerProcess
    environment: WorkerProcess

    @classmethod
    def create(cls, python: str | None) -> Workers:
        """Return the workers of a run. ``python`` is the Python interpreter that the run file sets
        for the environment; None if it sets none. No process is started yet.
        """
        rewards = WorkerProcess()
        return cls(rewards, rewards if python is None else WorkerProcess(python))


class WorkerFailed(Exception):
    """Raised if the worker process ended during a call, or if its reply was invalid. The text
    completes the sentence "reward NAME ...".
    """


class _WorkerReplaced(Exception):
    """Raised in a running call if the worker was killed because of another call."""


class WorkerProcess:
    """A worker process. It is started at the first call. If it was killed, it is started again at
    the next call, and all functions are loaded again.
    """

    def __init__(self, python: str | None = None) -> None:
        """``python`` is the interpreter of the worker (``environment.python``). None means the
        interpreter of this process. Another interpreter uses its own packages, except that it
        imports ``toolkit`` from the installation of this process.
        """
        self._python = python
        self._lock = threading.RLock()
        self._running: _RunningWorker | None = None
        self._load_requests: list[dict[str, Any]] = []

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load a reward, a tool or an environment in the worker, and return the worker's reply.

        For a reward, the reply is ``{"function": number of the function, "is_async": ...}``.

        Raises the ToolkitError that occurred in the worker. Raises WorkerFailed if the worker
        ended.
        """
        with self._lock:
            running = self._ensure_started()
            try:
                reply = _ask_worker(running, {"do": "load", **request}, None)
            except WorkerFailed:
                self.close(running)
                raise
            self._load_requests.append(request)
            return reply

    def call(self, request: dict[str, Any], seconds: float | None) -> dict[str, Any]:
        """Send ``request`` to the worker, and return its reply. If there is no reply after
        ``seconds`` (None: no limit), kill the worker and raise OutOfTime.

        Raises WorkerFailed if the worker ended. Raises the ToolkitError that occurred in the
        worker. Raises TypeError or ValueError if the request cannot be sent.
        """
        while True:
            with self._lock:
                running = self._ensure_started()
            try:
                return _ask_worker(running, {"do": "call", **request}, seconds)
            except _WorkerReplaced:
                continue
            except (ToolkitError, TypeError, ValueError):
                raise
            except BaseException:
                # A timeout, the end of the worker, or a signal to the run. The worker may still be
                # busy with this call, so it is killed.
                self.close(running)
                raise

    def close(self, running: _RunningWorker | None = None) -> None:
        """Kill the worker process and all processes that it started.

        If ``running`` is given but is no longer the current worker process, nothing is killed.
        """
        with self._lock:
            if self._running is not None and running in (None, self._running):
                self._running.kill()
                self._running = None

    def _ensure_started(self) -> _RunningWorker:
        if self._running is None:
            running = self._running = _RunningWorker(self._python)
            try:
                for request in self._load_requests:
                    _ask_worker(running, {"do": "load", **request}, _RELOAD_LIMIT_S)
            except BaseException:
                self.close()
                raise
        return self._running


class _RunningWorker:
    """One running worker process.

    Several threads may send requests. A lock protects sending, and a thread delivers each reply to
    its caller.
    """

    def __init__(self, python: str | None) -> None:
        requests_end, self._requests = os.pipe()
        self._replies, replies_end = os.pipe()
        os.set_blocking(self._requests, False)
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._send_lock, self._last_id = threading.Lock(), 0
        arguments = [str(argument) for argument in (requests_end, replies_end, os.getpid())]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START_CODE, *arguments, *sys.path]
                if python is None
                else [python, "-c", OTHER_PYTHON_START_CODE, *arguments, str(_PACKAGE_FOLDER)],
                stdin=subprocess.DEVNULL,
                pass_fds=(requests_end, replies_end),
                # The worker must not get Ctrl-C and the signals of a scheduler.
                start_new_session=True,
                # With a fixed hash seed, a set of texts has the same order after a restart.
                env={"PYTHONHASHSEED": "0", **os.environ},
            )
        except OSError as problem:
            os.close(self._requests)
            os.close(self._replies)
            if python is None or problem.filename != python:
                raise
            raise ConfigError(
                f"{python} cannot be started: {problem.strerror}",
                where="environment.python",
                fix="set it to the Python interpreter of a virtual environment that has the "
                "environment's package, such as openenv-venv/bin/python",
            ) from problem
        finally:
            os.close(requests_end)
            os.close(replies_end)
        reader_arguments = (self._replies, self._pending, self._process)
        threading.Thread(
            target=_deliver_replies, args=reader_arguments, daemon=True, name="reward-worker"
        ).start()
        self._finalizer = weakref.finalize(
            self, _end_process, os.getpid(), self._process, self._requests
        )

    def ask(self, request: dict[str, Any], seconds: float | None) -> dict[str, Any]:
        deadline = None if seconds is None else time.monotonic() + seconds
        reply: Future[dict[str, Any]] = Future()
        with self._send_lock:
            self._last_id += 1
            request_id = self._last_id
            frame = worker_channel.pack({"id": request_id, **request})
            self._pending[request_id] = reply
            try:
                was_sent = worker_channel.send(self._requests, frame, deadline)
            except worker_channel.ChannelError:
                was_sent = True  # the worker has ended, and the reading thread reports how
        try:
            remaining_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            return reply.result(remaining_s if was_sent else 0)
        except FutureTimeout:
            raise OutOfTime(f"took longer than {seconds:g} s") from None
        finally:
            self._pending.pop(request_id, None)

    def kill(self) -> None:
        # The pending calls get this exception first. Otherwise the reading thread would report the
        # end of the process as a crash.
        for reply in list(self._pending.values()):
            with suppress(Exception):
                reply.set_exception(_WorkerReplaced())
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._finalizer()


def _end_process(owner: int, process: subprocess.Popen[bytes], requests: int) -> None:
    """Close the pipe ``requests``, so that the worker runs its exit handlers and ends. At most
    ``_EXIT_LIMIT_S`` seconds later, kill the process group of the worker.
    """
    os.close(requests)
    if os.getpid() != owner:  # in a fork of the run, the worker is not a child of this process
        return
    _wait_for_exit(process, _EXIT_LIMIT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the id is valid until the process is reaped below
    process.wait()


def _wait_for_exit(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait at most ``seconds`` until ``process`` ends, and return its exit code. The process is not
    reaped.

    A negative exit code is the number of a signal. None means that the process still runs.
    """
    deadline = time.monotonic() + seconds
    wait_flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while True:
        try:
            exit_info = os.waitid(os.P_PID, process.pid, wait_flags)
        except ChildProcessError:
            return process.returncode
        if exit_info is not None:
            return (
                exit_info.si_status if exit_info.si_code == os.CLD_EXITED else -exit_info.si_status
            )
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def _deliver_replies(
    replies: int, pending: dict[int, Future[dict[str, Any]]], process: subprocess.Popen[bytes]
) -> None:
    problem = None
    with suppress(worker_channel.ChannelError):
        while (message := worker_channel.receive(replies)) is not None:
            request_id = message.get("id") if isinstance(message, dict) else None
            if type(request_id) is not int:
                problem = INVALID_REPLY  # a reward has written to the pipe
                break
            reply = pending.pop(request_id, None)
            if reply is not None:
                reply.set_result(message)
    os.close(replies)
    if not pending:
        return
    problem = problem or _describe_exit(process)
    for reply in list(pending.values()):
        with suppress(Exception):
            reply.set_exception(WorkerFailed(problem))


def _describe_exit(process: subprocess.Popen[bytes]) -> str:
    code = _wait_for_exit(process, 5.0)
    if code is None:
        return "closed the pipe of its process"
    number = code - 128 if code > 128 else -code
    if number <= 0:
        return f"ended its process with exit code {code}"
    known = number in {*signal.Signals}
    return f"ended its process by {signal.Signals(number).name if known else f'signal {number}'}"


def _ask_worker(
    running: _RunningWorker, request: dict[str, Any], seconds: float | None
) -> dict[str, Any]:
    """Send ``request`` to the worker process ``running``, and return its reply.

    Raises the ToolkitError that the reply contains. Raises WorkerFailed for an invalid reply. The
    errors of ``_RunningWorker.ask`` are raised too.
    """
    reply = running.ask(request, seconds)
    if not is_valid(request, reply):
        raise WorkerFailed(INVALID_REPLY)
    if "error" not in reply:
        return reply
    class_name, message, where, fix = reply["error"]
    error_class = getattr(errors, str(class_name), None)
    if not (isinstance(error_class, type) and issubclass(error_class, ToolkitError)):
        error_class = errors.ConfigError  # the name is that of an exception class of the reward
    raise error_class(message, where=where, fix=fix)

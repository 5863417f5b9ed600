"""The worker process, in which rewards, tools and environments run. The run starts the worker, and
kills it if a call hangs.

The worker consists of two processes. The first process calls the rewards, tools and environments.
It calls synchronous functions in its main thread, because code that uses alarms (math_verify) works
only there. It runs coroutines concurrently in an event loop.

The second process is the supervisor. When the run has ended, the supervisor kills the process group
of the worker, with all processes that a reward started. This works even if a reward never returns
from native code.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from toolkit.base.errors import ToolkitError
from toolkit.base.secrets import protect_output
from toolkit.config.run_config import RewardFunction
from toolkit.train.logging_setup import silence_upstream
from toolkit.train.rewards import worker_channel
from toolkit.train.rewards.environment_code import EnvironmentCode
from toolkit.train.rewards.environment_problems import generate_problems
from toolkit.train.rewards.loggable_values import extra_values, metric_name, metric_value, safe_text
from toolkit.train.rewards.openenv import Episodes
from toolkit.train.rewards.reward_call import Batch, LoopThread, call_reward, is_async
from toolkit.train.rewards.reward_factory import make_function
from toolkit.train.rewards.score_checks import Failure, UserCodeFailed, failure_from
from toolkit.train.rewards.tool_calls import InvalidToolCall, LocalTool, run_user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

MAX_LOGGED_VALUES = 10_000  # the maximum number of values that one call can log
CHECK_INTERVAL_S = 0.5  # the seconds between two checks of the supervisor that the run still exists
# The seconds until the children of a killed run have a new parent. The run's pipes close earlier.
_REPARENT_WAIT_S = 0.02
_SIGNALS_FOR_THE_RUN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def main(requests: int, replies: int, run_pid: int) -> NoReturn:
    """Run the worker process: answer requests until the run ends or closes the pipe ``requests``.
    ``run_pid`` is the process id of the run.
    """
    os.set_inheritable(requests, False)
    os.set_inheritable(replies, False)
    # An empty handler is used instead of SIG_IGN, because programs that a reward starts would
    # inherit SIG_IGN.
    for signal_number in _SIGNALS_FOR_THE_RUN:
        signal.signal(signal_number, lambda *_: None)
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    service_pid = os.fork()
    if service_pid:
        os.close(requests)
        os.close(replies)
        _supervise(service_pid, run_pid)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    protect_output()
    silence_upstream()
    sys.meta_path.insert(0, _SeedingFinder())
    try:
        Service(replies).serve(requests)
    except (
        worker_channel.ChannelError
    ):  # the run has ended, or a reward closed or wrote to the pipes
        os._exit(1)
    with suppress(BaseException):
        atexit._run_exitfuncs()
    _flush()
    os._exit(0)


def _supervise(service_pid: int, run_pid: int) -> NoReturn:
    """Run the supervisor: wait until the service process ends, and exit with its exit code. If the
    run ends first, kill the worker's process group, which contains the service process and this
    supervisor.

    ``service_pid`` is the process id of the service process, which answers the requests.
    ``run_pid`` is the process id of the run.
    """
    while True:
        ended_pid, status = os.waitpid(service_pid, os.WNOHANG)
        if ended_pid:
            # If the run was killed, the supervisor must kill the processes that a reward started.
            time.sleep(_REPARENT_WAIT_S)
            if os.getppid() != run_pid:
                os.killpg(0, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        if os.getppid() != run_pid:
            os.killpg(0, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, CHECK_INTERVAL_S)


class Service:
    """Answers the requests of the run. There are five kinds of requests.

    ``load`` loads a reward, a tool or an environment. ``call`` calls a reward. ``tool`` runs a tool
    call that a model wrote, and ``episode`` runs a step of an environment. ``generate_problems``
    generates the rows of an environment.
    """

    def __init__(self, replies: int) -> None:
        self._replies, self._reply_lock = replies, threading.Lock()
        self._functions: list[Callable[..., Any]] = []
        self._tools: list[LocalTool] = []
        self._episodes: list[Episodes] = []
        # Each function has its own loop, so that a blocked loop does not stop other functions.
        self._loops: list[LoopThread] = []

    def serve(self, requests: int) -> None:
        """Answer requests until the run closes the pipe."""
        service_pid = os.getpid()
        while (request := worker_channel.receive(requests)) is not None:
            if request["do"] != "call":
                if request["do"] != "load":
                    _seed_random(request)
                self._answer(request, getattr(self, f"_{request['do']}"))
                self._clean_up_after_call(service_pid)
            elif is_async(self._functions[request["function"]]):
                answer = partial(self._answer, request, self._call)
                threading.Thread(target=answer, daemon=True).start()
            else:
                _seed_random(request)
                self._answer(request, self._call)
                self._clean_up_after_call(service_pid)

    @staticmethod
    def _clean_up_after_call(service_pid: int) -> None:
        if (
            os.getpid() != service_pid
        ):  # this is a child that a reward forked and that returned here
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)  # cancels an alarm that the reward left active
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _answer(self, request: Any, handler: Callable[[Any], dict[str, Any]]) -> None:
        try:
            reply = handler(request)
        except ToolkitError as error:
            error_class = type(error).__name__
            reply = {"error": [error_class, error.message, error.where, error.fix]}
        except UserCodeFailed as error:
            reply = {"misbehaved": list(error.failure)}
        except InvalidToolCall as error:
            reply = {"refused": str(error)}
        except BaseException as error:  # noqa: BLE001 - also KeyboardInterrupt, which only a reward can raise here
            reply = {"misbehaved": list(failure_from(error))}
        _flush()
        try:
            frame = worker_channel.pack({"id": request["id"], **reply})
        except (TypeError, ValueError, RecursionError) as error:  # an error with fields of any type
            failure = list(failure_from(error))
            frame = worker_channel.pack({"id": request["id"], "misbehaved": failure})
        with self._reply_lock:
            worker_channel.send(self._replies, frame)

    def _load(self, request: Any) -> dict[str, Any]:
        if request.get("what") == "tool":
            folder, schema = Path(request["folder"]), request.get("schema")
            tool = LocalTool(request["name"], request["allow_code"], folder, schema)
            self._tools.append(tool)
            return {"tool": len(self._tools) - 1, "schema": tool.schema}
        if request.get("what") == "episodes":
            self._episodes.append(Episodes(EnvironmentCode.from_request(request)))
            return {"episodes": len(self._episodes) - 1, "schema": self._episodes[-1].schema}
        entry = RewardFunction(name=request["name"], options=request["options"])
        folder, columns = Path(request["folder"]), request["columns"]
        function = make_function(entry, request["allow_code"], folder, columns)
        self._functions.append(function)
        self._loops.append(LoopThread())
        return {"function": len(self._functions) - 1, "is_async": is_async(function)}

    def _tool(self, request: Any) -> dict[str, Any]:
        tool = self._tools[request["tool"]]
        return {"value": tool.answer(request["arguments"], request["seconds"])}

    def _episode(self, request: Any) -> dict[str, Any]:
        reply: dict[str, Any] = self._episodes[request["episodes"]].advance(request)
        return reply

    def _problems(self, request: Any) -> dict[str, Any]:
        code = EnvironmentCode.from_request(request)
        return {
            "rows": run_user_code(
                lambda: generate_problems(code, request["seed"], request["size"], request["start"])
            )
        }

    def _call(self, request: Any) -> dict[str, Any]:
        logged: list[list[Any]] = []
        columns = dict(request["columns"])
        for name in request["logs"]:
            columns[name] = _log_collector(logged, name)
        if request["state"] is not None:
            columns["trainer_state"] = SimpleNamespace(**request["state"])
        batch = Batch(request["prompts"], request["completions"], columns)
        index = request["function"]
        reply: dict[str, Any]
        try:
            scores = call_reward(
                self._functions[index], batch, request["seconds"], self._loops[index]
            )
            reply = {"found": [list(v) if isinstance(v, Failure) else v for v in scores]}
        except UserCodeFailed as error:
            reply = {"misbehaved": list(error.failure)}
        return {**reply, "logged": logged}


def _log_collector(logged: list[list[Any]], log_function: str) -> Callable[[str, Any], None]:
    def log(key: str, value: object) -> None:
        if len(logged) < MAX_LOGGED_VALUES:
            if log_function == "log_metric":
                logged_name, logged_value = metric_name(key), metric_value(value)
            else:
                logged_name, logged_value = str(key), to_json_value(extra_values(value))
            logged.append([log_function, safe_text(logged_name), logged_value])

    return log


def to_json_value(value: object) -> Any:
    """Convert ``value`` to JSON values. Tensors and arrays become lists of numbers. Objects of
    other types become text.
    """
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return safe_text(value)
    if isinstance(value, dict):
        return {safe_text(str(key)): to_json_value(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return to_json_value(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    return float(value) if isinstance(value, int | float) else str(value)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


# --- Random numbers. They depend only on the run's seed, the step and the scored samples. Therefore
# they are the same after the run resumes or the worker restarts.

_current_seed = 0


def _seed_random(request: Any) -> None:
    global _current_seed
    state = request.get("state") or {}
    names = ("prompts", "completions") if request["do"] == "call" else ("place", "arguments")
    seed_parts = [request["seed"], state.get("global_step"), *(request.get(name) for name in names)]
    digest = hashlib.sha256(json.dumps(seed_parts, default=str).encode()).digest()
    _current_seed = int.from_bytes(digest[:4], "big")
    random.seed(_current_seed)
    for name in ("numpy", "torch"):
        if name in sys.modules:
            _seed_library(name, sys.modules[name])


def _seed_library(name: str, module: Any) -> None:
    if name == "numpy":
        module.random.seed(_current_seed)
    else:
        module.manual_seed(_current_seed)


class _SeedingFinder(MetaPathFinder):
    """An import finder that seeds numpy and torch when a reward imports them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of numpy or torch (importlib's protocol), or None for other modules. The
        spec's loader seeds the module after executing it.
        """
        if fullname not in ("numpy", "torch") or path is not None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_seed(module: ModuleType) -> None:
                execute(module)
                _seed_library(fullname, module)

            spec.loader.exec_module = execute_and_seed  # type: ignore[method-assign]
        return spec

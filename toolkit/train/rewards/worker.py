"""The process that rewards run in: started beside the run, and ended by it where a call hangs.

Two processes: one waits and the other works. The one that waits ends the whole session, what a
reward has started included, when the run is gone, even where the other never leaves native code.
The one that works calls synchronous rewards in its main thread, so that code with alarms of its own
(math_verify) finds them working, and coroutines in a loop, several at once.
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
from toolkit.train.logging_setup import keep_upstream_quiet
from toolkit.train.rewards import wire
from toolkit.train.rewards.attempt import Batch, LoopThread, attempt, is_async
from toolkit.train.rewards.logged import number, shortened
from toolkit.train.rewards.make import make_function
from toolkit.train.rewards.returned import Misbehaved, Trouble, raised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

MOST_LOGGED = 10_000  # metrics and columns of one call
LOOK_S = 0.5  # how often the one that waits looks whether the run is still there
_LAST_LOOK_S = 0.02  # a process that is killed closes its pipes before its children see it gone
_LEFT_TO_THE_RUN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def main(requests: int, replies: int, run: int) -> NoReturn:
    """Serve the process ``run`` until it ends or closes the pipe ``requests``."""
    os.set_inheritable(requests, False)
    os.set_inheritable(replies, False)
    # A handler and not SIG_IGN, which the programs that a reward starts would inherit.
    for left in _LEFT_TO_THE_RUN:
        signal.signal(left, lambda *_: None)
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    working = os.fork()
    if working:
        os.close(requests)
        os.close(replies)
        _wait(working, run)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, old)
    protect_output()
    keep_upstream_quiet()
    sys.meta_path.insert(0, _Seeding())
    try:
        Service(replies).serve(requests)
    except wire.Broken:  # the run is gone, or a reward has closed or written to our pipes
        os._exit(1)
    with suppress(BaseException):
        atexit._run_exitfuncs()
    _flush()
    os._exit(0)


def _wait(working: int, run: int) -> NoReturn:
    """Until ``working`` ends; all of the session is killed when ``run`` is no longer there."""
    while True:
        done, status = os.waitpid(working, os.WNOHANG)
        if done:
            # Where the run was killed, nobody else ends what a reward has started.
            time.sleep(_LAST_LOOK_S)
            if os.getppid() != run:
                os.killpg(0, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        if os.getppid() != run:
            os.killpg(0, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_S)


class Service:
    """Answers requests: each ``load`` adds a function, each ``call`` calls one."""

    def __init__(self, replies: int) -> None:
        self._replies, self._writing = replies, threading.Lock()
        self._functions: list[Callable[..., Any]] = []
        self._loops: list[LoopThread] = []  # one a function: a blocked one stops no other

    def serve(self, requests: int) -> None:
        """Until the other end is closed."""
        working = os.getpid()
        while (request := wire.receive(requests)) is not None:
            if request["do"] == "load":
                self._answer(request, self._load)
            elif is_async(self._functions[request["function"]]):
                work = partial(self._answer, request, self._call)
                threading.Thread(target=work, daemon=True).start()
            else:
                _seed(request)
                self._answer(request, self._call)
                if os.getpid() != working:  # a fork that a reward made, and let come back
                    os._exit(0)
                signal.setitimer(signal.ITIMER_REAL, 0)  # one that the reward left behind
                signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _answer(self, request: Any, work: Callable[[Any], dict[str, Any]]) -> None:
        try:
            reply = work(request)
        except ToolkitError as error:
            kind = type(error).__name__
            reply = {"error": [kind, error.message, error.where, error.fix]}
        except Misbehaved as error:
            reply = {"misbehaved": list(error.trouble)}
        except BaseException as error:  # noqa: BLE001 - also KeyboardInterrupt: nobody else raises it here
            reply = {"misbehaved": list(raised(error))}
        _flush()
        frame = wire.pack({"id": request["id"], **reply})
        with self._writing:
            wire.send(self._replies, frame)

    def _load(self, request: Any) -> dict[str, Any]:
        wanted = RewardFunction(name=request["name"], options=request["options"])
        folder, columns = Path(request["folder"]), request["columns"]
        function = make_function(wanted, request["allow_code"], folder, columns)
        self._functions.append(function)
        self._loops.append(LoopThread())
        return {"function": len(self._functions) - 1, "is_async": is_async(function)}

    def _call(self, request: Any) -> dict[str, Any]:
        logged: list[list[Any]] = []
        columns = dict(request["columns"])
        for name in request["logs"]:
            columns[name] = _logger(logged, name)
        if request["state"] is not None:
            columns["trainer_state"] = SimpleNamespace(**request["state"])
        batch = Batch(request["prompts"], request["completions"], columns)
        number = request["function"]
        found: dict[str, Any]
        try:
            values = attempt(
                self._functions[number], batch, request["seconds"], self._loops[number]
            )
            found = {"found": [list(v) if isinstance(v, Trouble) else v for v in values]}
        except Misbehaved as error:
            found = {"misbehaved": list(error.trouble)}
        return {**found, "logged": logged}


def _logger(logged: list[list[Any]], name: str) -> Callable[[str, Any], None]:
    def log(key: str, value: Any) -> None:
        if len(logged) < MOST_LOGGED:
            shown = number(value) if name == "log_metric" else plain(value)
            logged.append([name, shortened(str(key)), shown])

    return log


def plain(value: Any) -> Any:
    """``value`` as JSON has it: numbers of tensors and arrays, and text for what is no number."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, dict):
        return {shortened(str(key)): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return float(value) if isinstance(value, int | float) else str(value)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


# --- random numbers: a function of the run's seed and of what is scored, so that a run that was
# killed and resumed, or whose worker was ended, draws the same ones

_seed_now = 0


def _seed(request: Any) -> None:
    global _seed_now
    state = request["state"] or {}
    scored = [request["seed"], state.get("global_step"), request["prompts"], request["completions"]]
    digest = hashlib.sha256(json.dumps(scored, default=str).encode()).digest()
    _seed_now = int.from_bytes(digest[:4], "big")
    random.seed(_seed_now)
    for name in ("numpy", "torch"):
        if name in sys.modules:
            _seed_library(name, sys.modules[name])


def _seed_library(name: str, module: Any) -> None:
    if name == "numpy":
        module.random.seed(_seed_now)
    else:
        module.manual_seed(_seed_now)


class _Seeding(MetaPathFinder):
    """Seeds a library that a reward imports while it is called."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """importlib's."""
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

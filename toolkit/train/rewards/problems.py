"""The problems of an environment as rows of a data set: which code makes them, in which process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.errors import ConfigError
from toolkit.base.time_limits import OutOfTime
from toolkit.config.build import thaw
from toolkit.config.code import is_allowed
from toolkit.config.environments import ADAPTERS, task_module
from toolkit.train.rewards import openenv, reasoning_gym, verifiers_tasks
from toolkit.train.rewards.returned import Misbehaved, Trouble
from toolkit.train.rewards.tool_calls import guarded
from toolkit.train.rewards.user import look_beside
from toolkit.train.rewards.worker_process import Died

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.config.run_config import RunConfig
    from toolkit.train.rewards.worker_process import WorkerProcess

Row = dict[str, Any]


class EnvironmentCode(NamedTuple):
    """The code of an environment: its adapter, task and options, and what the run file allows."""

    adapter: str
    task: str
    options: dict[str, Any]
    allow_code: tuple[str, ...]
    folder: Path

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> EnvironmentCode:
        """The code that a request names."""
        adapter, task, options = request["adapter"], request["task"], request["options"]
        folder = Path(request["folder"])
        return cls(adapter, task, options, tuple(request["allow_code"]), folder)

    def request(self) -> dict[str, Any]:
        """As JSON, for the worker process."""
        named = self._asdict() | {"allow_code": list(self.allow_code), "folder": str(self.folder)}
        return {**named, "options": thaw(self.options)}

    def prepare(self) -> None:
        """Let its modules be imported.

        Raises:
            ConfigError: runtime.allow_code does not name them.
        """
        refuse_package(self.adapter, self.allow_code)
        module = task_module(self.adapter, self.task)
        if module is None:
            return
        if not is_allowed(module, self.allow_code):
            raise ConfigError(
                f"environment.task {self.task} is code of the module {module}, which "
                "runtime.allow_code does not list",
                where="environment.task",
                fix=f"if you trust the module, add {module.partition('.')[0]} to allow_code",
            )
        look_beside(self.folder, self.allow_code)


def code_of(config: RunConfig) -> EnvironmentCode | None:
    """The code of the run's environment; None if it has none."""
    section = config.environment
    if section is None:
        return None
    folder = Path(config.source).resolve().parent if config.source else Path.cwd()
    options = thaw(section.options)
    allowed = tuple(config.runtime.allow_code)
    return EnvironmentCode(section.adapter, section.task, options, allowed, folder)


def refuse_package(adapter: str, allow_code: Sequence[str]) -> None:
    """Raises ConfigError if the package of an environment is not allowed."""
    module = ADAPTERS[adapter].modules[0]
    if not is_allowed(module, allow_code):
        raise ConfigError(
            f"the environment {adapter} is code, and runtime.allow_code does not allow its module",
            fix=f"runtime: {{allow_code: [{module}]}}, if you trust it",
        )


def problems(code: EnvironmentCode, seed: int, size: int, start: int = 0) -> list[Row]:
    """Up to ``size`` rows ``{prompt, problem}`` (with ``answer`` where the task has one), the same
    for the same seed. ``start``: the first one of a finite list of tasks, as held-out rows follow
    those of training there.

    Raises:
        ConfigError: there is no such task, it does not take these options, or it needs something
            that a training run does not have.
    """
    code.prepare()
    if code.adapter == "reasoning_gym":
        return reasoning_gym.problems(code.task, code.options, seed=seed, size=size)
    if code.adapter == "verifiers":
        return verifiers_tasks.rows(code.task, code.options, seed=seed, size=size, start=start)
    return openenv.rows(code.task, code.options, seed=seed, size=size)


def made(
    code: EnvironmentCode,
    worker: WorkerProcess | None,
    seconds: float | None,
    **which: int,
) -> list[Row]:
    """``problems`` in the worker process (None: in this one), within ``seconds``.

    Raises:
        ConfigError: as ``problems``, or the environment failed, took too long or ended its process.
    """
    try:
        if worker is None:
            rows: list[Row] = guarded(lambda: problems(code, **which))
            return rows
        reply = worker.call({**code.request(), **which, "do": "problems"}, seconds)
        if "misbehaved" in reply:
            raise Misbehaved(Trouble(*reply["misbehaved"]))
        return list(reply["rows"])
    except Misbehaved as error:
        what = error.trouble.what
    except (OutOfTime, Died) as error:
        what = str(error)
    raise ConfigError(
        f"the environment {code.adapter}:{code.task} {what} while it made its problems",
        where="environment",
        fix="correct the environment, or set reward.timeout_s to a longer time",
    )

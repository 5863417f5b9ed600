"""Generate the problems of an environment as rows of a dataset, in this process or in the worker
process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError
from toolkit.base.time_limits import OutOfTime
from toolkit.train.rewards import openenv, reasoning_gym, verifiers_tasks
from toolkit.train.rewards.score_checks import Failure, UserCodeFailed
from toolkit.train.rewards.tool_calls import run_user_code
from toolkit.train.rewards.worker_process import WorkerFailed

if TYPE_CHECKING:
    from toolkit.train.rewards.environment_code import EnvironmentCode
    from toolkit.train.rewards.worker_process import WorkerProcess

Row = dict[str, Any]


def generate_problems(code: EnvironmentCode, seed: int, size: int, start: int = 0) -> list[Row]:
    """Return up to ``size`` rows ``{prompt, problem}``. The rows also have ``answer`` if the
    environment has answers.

    The same seed always gives the same rows. If the problems are a finite list, ``start`` is the
    position of the first problem to use. Held-out rows begin where the training rows end.

    Raises:
        ConfigError: the task does not exist, it does not accept these options, or it needs
            something that a training run cannot provide.
    """
    code.make_module_importable()
    if code.adapter == "reasoning_gym":
        return reasoning_gym.generate_rows(code.task, code.options, seed=seed, size=size)
    if code.adapter == "verifiers":
        return verifiers_tasks.generate_rows(
            code.task, code.options, seed=seed, size=size, start=start
        )
    return openenv.generate_rows(code.task, code.options, seed=seed, size=size)


def request_problems(
    code: EnvironmentCode,
    worker: WorkerProcess | None,
    seconds: float | None,
    **selection: int,
) -> list[Row]:
    """Return the rows of ``generate_problems(code, **selection)``. The call runs in the process
    ``worker``, with the time limit ``seconds``.

    If ``worker`` is None, the call runs in this process and has no time limit.

    Raises:
        ConfigError: ``generate_problems`` raised a ConfigError, or the environment failed, took too
            long or ended its process.
    """
    try:
        if worker is None:
            rows: list[Row] = run_user_code(lambda: generate_problems(code, **selection))
            return rows
        reply = worker.call({**code.to_request(), **selection, "do": "problems"}, seconds)
        if "misbehaved" in reply:
            raise UserCodeFailed(Failure(*reply["misbehaved"]))
        return list(reply["rows"])
    except UserCodeFailed as error:
        description = error.failure.description
    except (OutOfTime, WorkerFailed) as error:
        description = str(error)
    raise ConfigError(
        f"the environment {code.adapter}:{code.task} {description} while it generated its problems",
        where="environment",
        fix="correct the environment, or set reward.timeout_s to a longer time",
    )

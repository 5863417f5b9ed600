"""The tools of a run file, and environments. The method ``step`` of an environment is offered to
the model as a tool.

Tools and environments are called in the worker process, with a time limit for each call. With
``reward.isolate: false``, tools are called in the training process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.errors import ConfigError, ToolkitError
from toolkit.base.time_limits import OutOfTime
from toolkit.train.rewards.score_checks import Failure, UserCodeFailed
from toolkit.train.rewards.tool_calls import TOOLS_KEY, InvalidToolCall, LocalTool
from toolkit.train.rewards.worker_process import WorkerFailed
from toolkit.train.rewards.worker_rewards import NO_ISOLATION_FIX, RemoteReward

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from toolkit.config.run_config import RunConfig
    from toolkit.train.rewards.environment_code import EnvironmentCode
    from toolkit.train.rewards.worker_process import WorkerProcess

CallPosition = tuple[int, ...]
"""The place of a call: step, completion, turn, call. The seed of the tool's random numbers is
derived from the place.
"""


class CallFailed(Exception):
    """Raised if a tool call failed. TRL passes the text of this exception to the model, in place of
    the result of the call.
    """


class StopRun(BaseException):
    """Raised to end the run if a tool failed and tools.on_error is ``fail``.

    It is a BaseException, because TRL would pass the text of an Exception to the model and
    continue.
    """

    def __init__(self, error: ConfigError) -> None:
        super().__init__(error.message)
        self.error = error


class Tool(dict[str, Any]):
    """A tool that the model can call. The object is a dict and a function at the same time. The
    dict is the tool's JSON schema, which the chat template reads. TRL 1.16 calls the function.
    """

    def __init__(
        self, schema: Mapping[str, Any], answer: Callable[[Mapping[str, Any], CallPosition], str]
    ) -> None:
        super().__init__(schema)
        self.__name__ = str(schema["function"]["name"])
        self.answer = answer

    def __call__(self, /, **arguments: Any) -> str:
        return self.answer(arguments, ())


class ToolPolicy(NamedTuple):
    """The keys ``tools.on_error`` and ``tools.timeout_s`` of the run file, and the run's seed."""

    on_error: str
    timeout_s: float | None
    seed: int


def load_tools(config: RunConfig, worker: WorkerProcess | None) -> list[Tool]:
    """Return the tools in ``tools.functions`` of the run file.

    If ``worker`` is given, the code of the tools is imported and called only in the worker process.

    Raises:
        ConfigError: the code is not allowed or does not exist, a function has no docstring or type
            hints that describe its arguments, or two tools have the same name.
    """
    if config.tools is None:
        return []
    folder = Path(config.source).resolve().parent if config.source else Path.cwd()
    policy = ToolPolicy(
        config.tools.on_error, config.tools.timeout_s, int(config.grpo.get("seed", 0))
    )
    allowed = config.runtime.allow_code
    tools = []
    for name in config.tools.functions:
        if worker is None:
            local = LocalTool(name, allowed, folder)
            tools.append(
                Tool(local.schema, _with_failure_policy(name, policy, _answer_here(local, policy)))
            )
            continue
        request = {"what": "tool", "name": name, "allow_code": list(allowed)}
        loaded = _load_in_worker(worker, f"tool {name}", {**request, "folder": str(folder)})
        answer = _answer_in_worker(worker, loaded["tool"], policy)
        tools.append(Tool(loaded["schema"], _with_failure_policy(name, policy, answer)))
    _refuse_duplicate_names(tools)
    return tools


def _refuse_duplicate_names(tools: list[Tool]) -> None:
    names = [tool.__name__ for tool in tools]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise ConfigError(
            f"two tools are called {duplicate}, but the model identifies a tool only by its name",
            where=TOOLS_KEY,
            fix="rename one of the functions",
        )


def _load_in_worker(
    worker: WorkerProcess, described: str, request: dict[str, Any]
) -> dict[str, Any]:
    try:
        reply = worker.load(request)
    except WorkerFailed as error:
        raise ConfigError(
            f"{described} cannot be used, because the import of its module failed: the module "
            f"{error}",
            where=TOOLS_KEY,
            fix=NO_ISOLATION_FIX,
        ) from error
    if "misbehaved" in reply:
        raise ConfigError(
            f"{described} cannot be used, because the import of its module failed: the module "
            f"{reply['misbehaved'][0]}",
            where=TOOLS_KEY,
        )
    request["schema"] = reply["schema"]  # the worker uses the request again after a restart
    return reply


def _answer_here(
    tool: LocalTool, policy: ToolPolicy
) -> Callable[[Mapping[str, Any], CallPosition], str]:
    return lambda arguments, _: tool.answer(arguments, policy.timeout_s)


def _answer_in_worker(
    worker: WorkerProcess, tool_number: int, policy: ToolPolicy
) -> Callable[[Mapping[str, Any], CallPosition], str]:
    def answer(arguments: Mapping[str, Any], position: CallPosition) -> str:
        request = {
            "do": "tool",
            "tool": tool_number,
            "arguments": dict(arguments),
            "place": position,
        }
        return str(ask_worker(worker, {**request, "seed": policy.seed}, policy.timeout_s)["value"])

    return answer


def ask_worker(
    worker: WorkerProcess, request: dict[str, Any], timeout_s: float | None
) -> dict[str, Any]:
    """Send ``request`` to the worker and return its reply. ``timeout_s`` is the time limit of the
    call.

    Raises InvalidToolCall if the arguments are wrong, UserCodeFailed if the user's code failed, and
    ToolkitError.
    """
    kill_after_s = None if timeout_s is None else timeout_s + RemoteReward.reply_grace_s
    try:
        reply = worker.call({**request, "seconds": timeout_s}, kill_after_s)
    except OutOfTime:
        raise UserCodeFailed(Failure(f"took longer than {timeout_s:g} s")) from None
    except WorkerFailed as error:
        raise UserCodeFailed(Failure(str(error))) from error
    except ToolkitError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidToolCall(f"wrong arguments: {error}") from error
    if "refused" in reply:
        raise InvalidToolCall(reply["refused"])
    if "misbehaved" in reply:
        raise UserCodeFailed(Failure(*reply["misbehaved"]))
    return reply


def _with_failure_policy(
    name: str, policy: ToolPolicy, answer: Callable[[Mapping[str, Any], CallPosition], str]
) -> Callable[[Mapping[str, Any], CallPosition], str]:
    """Return a function that calls ``answer`` and treats a failure as ``tools.on_error`` of the run
    file requires.

    If a call fails, the returned function raises CallFailed or StopRun. The text of CallFailed
    becomes the answer to the model. StopRun ends the run. If the model's arguments are wrong, the
    returned function always raises CallFailed.
    """

    def call(arguments: Mapping[str, Any], position: CallPosition) -> str:
        try:
            return answer(arguments, position)
        except InvalidToolCall as error:
            raise CallFailed(str(error)) from error
        except UserCodeFailed as error:
            failure = error.failure.description
            if policy.on_error == "fail":
                timeout_hint = " raise tools.timeout_s," if "took longer than" in failure else ""
                shown_arguments = json.dumps(dict(arguments), ensure_ascii=False, default=str)[:500]
                raise StopRun(
                    ConfigError(
                        f"tool {name} {failure}\n  arguments of the call: {shown_arguments}",
                        where=TOOLS_KEY,
                        fix=f"correct the function,{timeout_hint} or set `tools.on_error: answer`. "
                        "The model then reads the error, and the run continues",
                    )
                ) from error
            raise CallFailed(failure) from error

    return call


class Episode:
    """One rollout in an environment, with the interface that TRL 1.16 needs of an environment.

    TRL calls ``reset`` to begin the rollout. TRL offers every other public method to the model as a
    tool.
    """

    def __init__(self, host: EpisodeHost, slot: int) -> None:
        self._host, self._slot = host, slot
        self._number, self._seed = 0, 0
        self._past_actions: list[dict[str, Any]] = []
        self._total_reward, self._has_ended = 0.0, False
        self._fault: Failure | None = None
        self.__dict__["step"] = Tool(host.schema, self._step)

    def __repr__(self) -> str:
        steps = len(self._past_actions)
        return f"Episode(seed={self._seed}, steps={steps}, reward={self._total_reward})"

    def reset(self, **row: Any) -> None:
        """Begin the problem of one row of the dataset. The prompt of the row must end with the
        first observation of the environment.
        """
        self._number, self._past_actions = self._number + 1, []
        self._total_reward, self._has_ended, self._fault = 0.0, False, None
        self._seed = json.loads(row["problem"])["seed"]
        prompt = row["prompt"]
        last_text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        observation = self._advance(None)
        if observation is not None and not last_text.endswith(observation["text"]):
            problem = f"returned another first observation for the seed {self._seed} than before"
            self._fault = Failure(problem, observation["text"][:200])

    def step(self) -> None:
        """Never called. TRL needs a method with this name in the class. In each object, the
        attribute ``step`` is a ``Tool`` that replaces this method.
        """
        raise NotImplementedError

    def score(self) -> float:
        """Return the sum of the rewards of all steps. Raises UserCodeFailed if the
        environment failed.
        """
        if self._fault is not None:
            raise UserCodeFailed(self._fault)
        return self._total_reward

    def _step(self, arguments: Mapping[str, Any], _: CallPosition) -> str:
        if self._fault is not None:
            raise CallFailed(f"the environment {self._fault.description}")
        if self._has_ended:
            raise CallFailed("the episode has ended")
        observation = self._advance(dict(arguments))
        if observation is None:
            assert self._fault is not None
            raise CallFailed(f"the environment {self._fault.description}")
        self._past_actions.append(dict(arguments))
        self._total_reward, self._has_ended = (
            self._total_reward + observation["reward"],
            observation["done"],
        )
        return (
            f"{observation['text']}\n(the episode has ended)"
            if self._has_ended
            else str(observation["text"])
        )

    def _advance(self, arguments: dict[str, Any] | None) -> dict[str, Any] | None:
        request = {
            "slot": self._slot,
            "number": self._number,
            "seed": self._seed,
            "past": self._past_actions,
            "arguments": arguments,
        }
        try:
            return self._host.answer(request)
        except InvalidToolCall as error:
            raise CallFailed(str(error)) from error
        except UserCodeFailed as error:
            self._fault = error.failure
            return None


class EpisodeHost:
    """The environment factory of a run. It creates the episodes. Their environments run in
    ``worker``, the worker process.
    """

    def __init__(
        self, code: EnvironmentCode, worker: WorkerProcess, timeout_s: float | None
    ) -> None:
        """Load the class of the environment.

        Raises:
            ConfigError: the class does not exist, is not allowed, or cannot be used.
        """
        described = f"environment {code.task}"
        loaded = _load_in_worker(worker, described, {**code.to_request(), "what": "episodes"})
        self._number, self.schema = loaded["episodes"], loaded["schema"]
        self._worker, self._seconds, self._slots = worker, timeout_s, 0

    def __call__(self) -> Episode:
        self._slots += 1
        return Episode(self, self._slots)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the environment's reply to one request of an episode: the next observation, the
        reward, and whether the episode has ended. Raises InvalidToolCall and UserCodeFailed.
        """
        call_keys = {"do": "episode", "episodes": self._number, "place": (request["number"],)}
        return ask_worker(self._worker, {**request, **call_keys}, self._seconds)

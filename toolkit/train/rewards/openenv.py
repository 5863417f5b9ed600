"""Use an ``Environment`` class of OpenEnv for training. It provides the prompts, a tool, and a
reward.

The toolkit creates the environment as an object in the worker process. It calls
``reset(seed=...)`` and ``step(action)`` of the object, and reads ``reward`` and ``done`` of the
observations. The server that OpenEnv itself uses for an environment is neither started nor called.

Each seed is a problem, and its prompt is the first observation. The model acts with the tool
``step``, whose arguments are the fields of the Action class. The score of a rollout is the sum of
the rewards of its steps.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from toolkit.base.errors import ConfigError, MissingExtraError, first_line
from toolkit.base.time_limits import call_within
from toolkit.train.rewards.reasoning_gym import PROBLEM_COLUMN
from toolkit.train.rewards.returned import Failure, UserCodeFailed, check_scores
from toolkit.train.rewards.tool_calls import InvalidToolCall, as_text, run_user_code

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.train.rewards.builtin import Score
    from toolkit.train.rewards.environment_code import EnvironmentCode

SUPPORTED_TASKS_FIX = (
    "set environment.task to `module:Class`, a subclass of Environment. The argument of its method "
    "step must have the type hint of an Action class whose fields have plain types"
)
_OF_THE_PROTOCOL = ("metadata", "done", "reward")
_MOST_LIVE = 4096


def generate_rows(
    task: str, options: Mapping[str, Any], *, seed: int, size: int
) -> list[dict[str, Any]]:
    """Return ``size`` rows ``{prompt, problem}`` of a data set. There is one row for each seed from
    ``seed`` to ``seed + size - 1``.

    Raises:
        ConfigError: the Environment class ``task`` does not exist, or cannot be used.
        MissingExtraError: the package openenv is not installed.
    """
    game = EnvironmentType(task, options)
    made = []
    for one in range(seed, seed + size):
        prompt = text_of_observation(game.reset(game.make(), one % 2**32))
        made.append({"prompt": prompt, PROBLEM_COLUMN: json.dumps({"seed": one % 2**32})})
    return made


class EnvironmentType:
    """An Environment class and its Action class."""

    def __init__(self, task: str, options: Mapping[str, Any]) -> None:
        """Import the class ``task`` (``module:Class``). ``options`` are the arguments of its
        constructor.
        """
        self.kind = _environment_class(task)
        self.options = dict(options)
        self.action = _action_class(task, self.kind)
        self.schema = _schema(self.kind, self.action)

    def make(self) -> Any:
        """Create one environment."""
        return self.kind(**self.options)

    @staticmethod
    def reset(environment: Any, seed: int) -> Any:
        """Reset ``environment`` with ``seed``, and return the first observation."""
        return environment.reset(seed=seed)

    def step(self, environment: Any, arguments: Mapping[str, Any]) -> Any:
        """Run the action with ``arguments`` in ``environment``, and return the next observation.
        Raises InvalidToolCall if the arguments are not valid for the Action class.
        """
        try:
            action = self.action.model_validate(dict(arguments))
        except ValueError as error:
            said = "; ".join(line.strip() for line in str(error).split("\n")[1:3])
            raise InvalidToolCall(f"wrong arguments: {said}") from None
        return environment.step(action)


@dataclass
class _Live:
    number: int
    environment: Any
    steps: int = 0


class Episodes:
    """The environments of the rollouts of a batch (one per rollout), in the worker process.

    Each request contains the seed of its rollout and all earlier steps. If an environment was lost
    in a restart of the worker, the worker creates the environment again and repeats these steps.
    """

    def __init__(self, code: EnvironmentCode) -> None:
        """Load the Environment class of ``code``. Raises ConfigError."""
        code.prepare()
        self._game = EnvironmentType(code.task, code.options)
        self.schema = self._game.schema
        self._live: dict[int, _Live] = {}

    def advance(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run the action ``arguments`` of ``request``, and return the text, the reward and ``done``
        of the next observation. If ``arguments`` is None, return these values of the first
        observation.

        Raises InvalidToolCall for invalid arguments, or UserCodeFailed if the environment failed.
        """

        def call() -> dict[str, Any]:
            seen = call_within(request["seconds"], lambda: self._advance(request))
            (reward,) = check_scores([0.0 if seen.reward is None else seen.reward], 1)
            if isinstance(reward, Failure):
                raise UserCodeFailed(reward)
            return {"text": text_of_observation(seen), "reward": reward, "done": bool(seen.done)}

        found: dict[str, Any] = run_user_code(call)
        return found

    def _advance(self, request: Mapping[str, Any]) -> Any:
        slot, past, arguments = request["slot"], request["past"], request["arguments"]
        live = self._live.get(slot)
        seen = None
        if live is None or (live.number, live.steps) != (request["number"], len(past)):
            if len(self._live) >= _MOST_LIVE:
                self._live.clear()
            live = self._live[slot] = _Live(request["number"], self._game.make())
            seen = self._game.reset(live.environment, request["seed"])
            for step in past:
                self._game.step(live.environment, step)
                live.steps += 1
        if arguments is not None:
            seen = self._game.step(live.environment, arguments)
            live.steps += 1
        return seen


@dataclass(frozen=True, kw_only=True)
class OpenEnv:
    """The score of a rollout: the sum of the rewards of its steps.

    The range depends on the environment. It is 0 to 1 if at most one step of a rollout has the
    reward 1 and all other steps have the reward 0.
    """

    name: ClassVar[str] = "openenv"
    task: str
    settings: dict[str, Any] | None = None

    def __call__(
        self, /, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[Score]:
        del prompts, completions
        return [episode.score() for episode in columns["environments"]]


def text_of_observation(observation: Any) -> str:
    """Return ``observation`` as text for the model.

    The fields ``reward``, ``done`` and ``metadata`` are left out. If only one field remains, and
    its value is a text, the result is this text. Otherwise, the result is a JSON object of the
    remaining fields.
    """
    fields = observation.model_dump(mode="json")
    said = {name: value for name, value in fields.items() if name not in _OF_THE_PROTOCOL}
    if len(said) == 1:
        (value,) = said.values()
        if isinstance(value, str):
            return as_text(value)
    return as_text(json.dumps(said, ensure_ascii=False))


def _package() -> Any:
    try:
        from openenv.core.env_server import interfaces  # noqa: PLC0415 - only this adapter needs it
    except ImportError as error:
        raise MissingExtraError(
            f"environment.adapter: openenv needs the package openenv: {first_line(error)}",
            fix="install openenv in a separate virtual environment, and set environment.python to "
            "the path of its interpreter. openenv and vLLM need different releases of mcp",
        ) from error
    return interfaces


def _environment_class(task: str) -> Any:
    interfaces = _package()
    module, _, name = task.partition(":")
    try:
        kind = getattr(__import__(module, fromlist=[name]), name, None)
    except ImportError as error:
        raise ConfigError(
            f"the environment {task} cannot be imported: {first_line(error)}",
            where="environment.task",
            fix="put the module next to the run file, or install the module for the Python "
            "interpreter in environment.python",
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, interfaces.Environment)):
        raise ConfigError(
            f"{task} is not a subclass of OpenEnv's Environment",
            where="environment.task",
            fix=SUPPORTED_TASKS_FIX,
        )
    return kind


def _action_class(task: str, kind: Any) -> Any:
    from openenv.core.env_server.types import Action  # noqa: PLC0415 - part of the optional package

    try:
        found = get_type_hints(kind.step).get("action")
    except (NameError, TypeError):
        found = None
    fields = getattr(found, "model_fields", {})
    if not (isinstance(found, type) and issubclass(found, Action) and set(fields) - {"metadata"}):
        raise ConfigError(
            f"the method {task}.step must have the type hint of an Action class for its argument "
            "action, and this class must have fields of its own",
            where="environment.task",
            fix=SUPPORTED_TASKS_FIX,
        )
    return found


def _schema(kind: Any, action: Any) -> dict[str, Any]:
    parameters = action.model_json_schema()
    parameters["properties"].pop("metadata", None)
    for name in ("title", "description", "additionalProperties"):
        parameters.pop(name, None)
    said = inspect.getdoc(kind.step) or "Act in the environment."
    described = action.__doc__ and inspect.cleandoc(action.__doc__)
    own = "Base class for all environment actions" not in (described or "")
    text = described if described and own else said.split("\n\n")[0]
    function = {"name": "step", "description": text, "parameters": parameters}
    return {"type": "function", "function": function}

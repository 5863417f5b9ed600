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
from toolkit.train.rewards.score_checks import Failure, UserCodeFailed, check_scores
from toolkit.train.rewards.tool_calls import InvalidToolCall, as_text, run_user_code

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.train.rewards.builtin import Score
    from toolkit.train.rewards.environment_code import EnvironmentCode

SUPPORTED_TASKS_FIX = (
    "set environment.task to `module:Class`, a subclass of Environment. The argument of its method "
    "step must have the type hint of an Action class whose fields have plain types"
)
_PROTOCOL_FIELDS = ("metadata", "done", "reward")
_MAX_EPISODES = 4096


def generate_rows(
    task: str, options: Mapping[str, Any], *, seed: int, size: int
) -> list[dict[str, Any]]:
    """Return ``size`` rows ``{prompt, problem}`` of a dataset. There is one row for each seed from
    ``seed`` to ``seed + size - 1``.

    Raises:
        ConfigError: the Environment class ``task`` does not exist, or cannot be used.
        MissingExtraError: the package openenv is not installed.
    """
    environment_type = EnvironmentType(task, options)
    data_rows = []
    for episode_seed in range(seed, seed + size):
        prompt_text = text_of_observation(
            environment_type.reset(environment_type.create(), episode_seed % 2**32)
        )
        data_rows.append(
            {"prompt": prompt_text, PROBLEM_COLUMN: json.dumps({"seed": episode_seed % 2**32})}
        )
    return data_rows


class EnvironmentType:
    """An Environment class and its Action class."""

    def __init__(self, task: str, options: Mapping[str, Any]) -> None:
        """Import the class ``task`` (``module:Class``). ``options`` are the arguments of its
        constructor.
        """
        self.environment_class = _environment_class(task)
        self.options = dict(options)
        self.action_class = _action_class(task, self.environment_class)
        self.schema = _tool_schema(self.environment_class, self.action_class)

    def create(self) -> Any:
        """Create one environment."""
        return self.environment_class(**self.options)

    @staticmethod
    def reset(environment: Any, seed: int) -> Any:
        """Reset ``environment`` with ``seed``, and return the first observation."""
        return environment.reset(seed=seed)

    def step(self, environment: Any, arguments: Mapping[str, Any]) -> Any:
        """Run the action with ``arguments`` in ``environment``, and return the next observation.
        Raises InvalidToolCall if the arguments are not valid for the Action class.
        """
        try:
            action = self.action_class.model_validate(dict(arguments))
        except ValueError as error:
            message = "; ".join(line.strip() for line in str(error).split("\n")[1:3])
            raise InvalidToolCall(f"wrong arguments: {message}") from None
        return environment.step(action)


@dataclass
class _Episode:
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
        code.make_module_importable()
        self._environment_type = EnvironmentType(code.task, code.options)
        self.schema = self._environment_type.schema
        self._episodes: dict[int, _Episode] = {}

    def advance(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run an action, and return the text, the reward and ``done`` of the next observation.

        ``request["arguments"]`` has the arguments of the action. If it is None, no action runs, and
        the values of the first observation are returned.

        Raises InvalidToolCall for invalid arguments, or UserCodeFailed if the environment failed.
        """

        def call() -> dict[str, Any]:
            observation = call_within(request["seconds"], lambda: self._advance(request))
            (reward,) = check_scores([0.0 if observation.reward is None else observation.reward], 1)
            if isinstance(reward, Failure):
                raise UserCodeFailed(reward)
            return {
                "text": text_of_observation(observation),
                "reward": reward,
                "done": bool(observation.done),
            }

        reply: dict[str, Any] = run_user_code(call)
        return reply

    def _advance(self, request: Mapping[str, Any]) -> Any:
        slot, past, arguments = request["slot"], request["past"], request["arguments"]
        episode = self._episodes.get(slot)
        observation = None
        if episode is None or (episode.number, episode.steps) != (request["number"], len(past)):
            if len(self._episodes) >= _MAX_EPISODES:
                self._episodes.clear()
            episode = self._episodes[slot] = _Episode(
                request["number"], self._environment_type.create()
            )
            observation = self._environment_type.reset(episode.environment, request["seed"])
            for step in past:
                self._environment_type.step(episode.environment, step)
                episode.steps += 1
        if arguments is not None:
            observation = self._environment_type.step(episode.environment, arguments)
            episode.steps += 1
        return observation


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
    shown_fields = {name: value for name, value in fields.items() if name not in _PROTOCOL_FIELDS}
    if len(shown_fields) == 1:
        (value,) = shown_fields.values()
        if isinstance(value, str):
            return as_text(value)
    return as_text(json.dumps(shown_fields, ensure_ascii=False))


def _import_interfaces() -> Any:
    try:
        from openenv.core.env_server import interfaces  # noqa: PLC0415 - only this adapter needs it
    except ImportError as error:
        raise MissingExtraError(
            "environment.adapter is openenv, but the package openenv cannot be imported: "
            f"{first_line(error)}",
            fix="install openenv in a separate virtual environment, and set environment.python to "
            "the path of its interpreter. openenv and vLLM need different releases of mcp",
        ) from error
    return interfaces


def _environment_class(task: str) -> Any:
    interfaces = _import_interfaces()
    module, _, name = task.partition(":")
    try:
        environment_class = getattr(__import__(module, fromlist=[name]), name, None)
    except ImportError as error:
        raise ConfigError(
            f"the environment {task} cannot be imported: {first_line(error)}",
            where="environment.task",
            fix="put the module next to the run file, or install the module for the Python "
            "interpreter in environment.python",
        ) from error
    if not (
        isinstance(environment_class, type)
        and issubclass(environment_class, interfaces.Environment)
    ):
        raise ConfigError(
            f"{task} is not a subclass of OpenEnv's Environment",
            where="environment.task",
            fix=SUPPORTED_TASKS_FIX,
        )
    return environment_class


def _action_class(task: str, environment_class: Any) -> Any:
    from openenv.core.env_server.types import Action  # noqa: PLC0415 - part of the optional package

    try:
        action_class = get_type_hints(environment_class.step).get("action")
    except (NameError, TypeError):
        action_class = None
    fields = getattr(action_class, "model_fields", {})
    if not (
        isinstance(action_class, type)
        and issubclass(action_class, Action)
        and set(fields) - {"metadata"}
    ):
        raise ConfigError(
            f"the method {task}.step must have the type hint of an Action class for its argument "
            "action, and this class must have fields of its own",
            where="environment.task",
            fix=SUPPORTED_TASKS_FIX,
        )
    return action_class


def _tool_schema(environment_class: Any, action_class: Any) -> dict[str, Any]:
    parameters = action_class.model_json_schema()
    parameters["properties"].pop("metadata", None)
    for name in ("title", "description", "additionalProperties"):
        parameters.pop(name, None)
    docstring = inspect.getdoc(environment_class.step) or "Act in the environment."
    action_docstring = action_class.__doc__ and inspect.cleandoc(action_class.__doc__)
    has_own_docstring = "Base class for all environment actions" not in (action_docstring or "")
    text = (
        action_docstring if action_docstring and has_own_docstring else docstring.split("\n\n")[0]
    )
    function = {"name": "step", "description": text, "parameters": parameters}
    return {"type": "function", "function": function}

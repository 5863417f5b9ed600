"""Run a tool call that a model wrote. The model writes the arguments, and the user provides the
function.

The training process and the worker process use this module. Therefore both processes treat a faulty
tool in the same way. Wrong arguments are a mistake of the model, which gets an error text as the
answer. If the function itself fails (it raises, takes too long or returns too much),
``UserCodeFailed`` is raised, as for a reward.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, ToolkitError, first_line
from toolkit.base.time_limits import OutOfTime, call_within
from toolkit.train.rewards.reward_call import LoopThread, preserve_process_state
from toolkit.train.rewards.score_checks import (
    Failure,
    UserCodeFailed,
    exception_summary,
    failure_from,
)
from toolkit.train.rewards.user_reward import load_code

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

TOOLS_KEY = "tools.functions"
MAX_RESULT_CHARACTERS = 100_000
"""The maximum number of characters of a result. A longer result is an error, because it does not
fit into a completion.
"""


class InvalidToolCall(Exception):
    """Raised if the model's call is invalid. The model gets the text of this exception as the
    answer.
    """


class LocalTool:
    """A function of the user and its JSON schema, which the chat template shows to the model."""

    def __init__(
        self,
        name: str,
        allow_code: Sequence[str],
        folder: Path,
        schema: dict[str, Any] | None = None,
    ) -> None:
        """Load the function ``name`` (``module:function``).

        Without ``schema``, the JSON schema is created from the function. This imports transformers
        and torch. ``schema`` is a schema that was created earlier.

        Raises:
            ConfigError: the code is not allowed or does not exist, or the function has no
                docstring or type hints that describe its arguments.
        """
        self.function: Callable[..., Any] = load_code(name, allow_code, folder, noun="tool")
        self.schema = schema or _create_schema(name, self.function)
        self._loop = LoopThread()

    def answer(self, arguments: Mapping[str, Any], seconds: float | None) -> str:
        """Call the user's function, and return its result as text.

        Raises:
            InvalidToolCall: the function does not accept these arguments.
            UserCodeFailed: the function failed.
        """
        try:
            inspect.signature(self.function).bind(**arguments)
        except TypeError as error:
            raise InvalidToolCall(f"wrong arguments: {error}") from None
        text: str = run_user_code(lambda: self._call(arguments, seconds))
        return text

    def _call(self, arguments: Mapping[str, Any], seconds: float | None) -> str:
        if inspect.iscoroutinefunction(self.function):
            result = self._loop.call_within(seconds, _await_result(self.function(**arguments)))
            if isinstance(result, BaseException):
                raise result
            return as_text(result)
        return call_within(seconds, lambda: as_text(self.function(**arguments)))


def _create_schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import get_json_schema  # noqa: PLC0415 - slow: the worker starts faster without it

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except Exception as error:
        raise ConfigError(
            f"tool {name}: {first_line(error)}",
            where=TOOLS_KEY,
            fix="add type hints to the function, and a docstring with a line `name: description` "
            "for each argument (section `Args:`)",
        ) from error
    return schema


def run_user_code(call: Callable[[], Any]) -> Any:
    """Call the user's code ``call`` and return its result.

    UserCodeFailed, InvalidToolCall and ToolkitError are raised unchanged. Any other exception
    becomes UserCodeFailed.
    """
    try:
        with preserve_process_state():
            return call()
    except (UserCodeFailed, InvalidToolCall, ToolkitError):
        raise
    except OutOfTime as error:
        raise UserCodeFailed(Failure(str(error))) from error
    except (Exception, SystemExit, GeneratorExit) as error:
        raise UserCodeFailed(failure_from(error)) from error


def as_text(value: object) -> str:
    """Return ``value`` as the text for the model. Raises UserCodeFailed if it is too long."""
    try:
        text = value if type(value) is str else str(value)
    except Exception as error:
        raise UserCodeFailed(
            Failure(f"returned a value that cannot become text: {exception_summary(error)}")
        ) from error
    if len(text) > MAX_RESULT_CHARACTERS:
        description = f"returned {len(text)} characters, more than {MAX_RESULT_CHARACTERS}"
        raise UserCodeFailed(Failure(description, text[:200]))
    # Lone surrogates are replaced, because neither a tokenizer nor a log file can encode them.
    return text.encode(errors="backslashreplace").decode()


async def _await_result(coroutine: Any) -> Any:
    """Await ``coroutine``. Return its result, or the exception that it raised.

    The exception is returned and not raised, because a SystemExit in a task would end the thread of
    the event loop.
    """
    try:
        return await coroutine
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        return error

"""Run a tool call that a model wrote. The model writes the arguments, and the user provides the
function.

The training process and the worker process use this module. Therefore both processes treat a faulty
tool in the same way. Wrong arguments are a mistake of the model, which gets an error text as the
answer. If the function itself fails (it raises, takes too long or returns too much), ``Misbehaved``
is raised, as for a reward.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, ToolkitError, first_line
from toolkit.base.time_limits import OutOfTime, call_within
from toolkit.train.rewards.attempt import LoopThread, process_kept
from toolkit.train.rewards.returned import Misbehaved, Trouble, message, raised
from toolkit.train.rewards.user import load_code

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

WHERE = "tools.functions"
LONGEST_RESULT = 100_000
"""The maximum number of characters of a result. A longer result is an error, because it does not
fit into a completion.
"""


class Refused(Exception):
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
        self.function: Callable[..., Any] = load_code(name, allow_code, folder, what="tool")
        self.schema = schema or _schema(name, self.function)
        self._loop = LoopThread()

    def answer(self, arguments: Mapping[str, Any], seconds: float | None) -> str:
        """Call the user's function, and return its result as text.

        Raises:
            Refused: the function does not accept these arguments.
            Misbehaved: the function failed.
        """
        try:
            inspect.signature(self.function).bind(**arguments)
        except TypeError as error:
            raise Refused(f"wrong arguments: {error}") from None
        text: str = guarded(lambda: self._call(arguments, seconds))
        return text

    def _call(self, arguments: Mapping[str, Any], seconds: float | None) -> str:
        if inspect.iscoroutinefunction(self.function):
            found = self._loop.call_within(seconds, _carried(self.function(**arguments)))
            if isinstance(found, BaseException):
                raise found
            return as_text(found)
        return call_within(seconds, lambda: as_text(self.function(**arguments)))


def _schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import get_json_schema  # noqa: PLC0415 - slow: the worker starts faster without it

    try:
        found: dict[str, Any] = get_json_schema(function)
    except Exception as error:
        raise ConfigError(
            f"tool {name}: {first_line(error)}",
            where=WHERE,
            fix="add type hints to the function, and a docstring with a line for each argument "
            "(section `Args:`)",
        ) from error
    return found


def guarded(call: Callable[[], Any]) -> Any:
    """Call the user's code ``call`` and return its result.

    Misbehaved, Refused and ToolkitError are raised unchanged. Any other exception becomes
    Misbehaved.
    """
    try:
        with process_kept():
            return call()
    except (Misbehaved, Refused, ToolkitError):
        raise
    except OutOfTime as error:
        raise Misbehaved(Trouble(str(error))) from error
    except (Exception, SystemExit, GeneratorExit) as error:
        raise Misbehaved(raised(error)) from error


def as_text(value: Any) -> str:
    """Return ``value`` as the text that the model reads. Raises Misbehaved if it is too long."""
    try:
        text = value if type(value) is str else str(value)
    except Exception as error:
        raise Misbehaved(
            Trouble(f"returned a value that cannot become text: {message(error)}")
        ) from error
    if len(text) > LONGEST_RESULT:
        what = f"returned {len(text)} characters, more than {LONGEST_RESULT}"
        raise Misbehaved(Trouble(what, text[:200]))
    # Lone surrogates are replaced, because neither a tokenizer nor a log file can encode them.
    return text.encode(errors="backslashreplace").decode()


async def _carried(coroutine: Any) -> Any:
    """Await ``coroutine``. Return its result, or the exception that it raised.

    The exception is returned and not raised, because a SystemExit in a task would end the thread of
    the event loop.
    """
    try:
        return await coroutine
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        return error

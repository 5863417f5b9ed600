"""Make a call of a tool that a model wrote: the arguments are the model's, the code is the user's.

The training process and the worker process both use this module, so each treats a faulty tool in
the same way. A wrong argument is the model's mistake, and the model gets an answer. An error of the
function itself (it raises, takes too long, returns too much) raises ``Misbehaved``, as for a
reward.
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
"""The most characters of a result. A longer one does not fit into a completion, and is an error."""


class Refused(Exception):
    """The call of the model cannot be made; the model reads the text of this exception as the
    answer.
    """


class LocalTool:
    """A function of the user's, and its description for a chat template."""

    def __init__(
        self,
        name: str,
        allow_code: Sequence[str],
        folder: Path,
        schema: dict[str, Any] | None = None,
    ) -> None:
        """Load ``module:function``. ``schema`` is that of an earlier load, if there was one:
        reading it from the function imports transformers and torch.

        Raises:
            ConfigError: the code is not allowed or does not exist, or the function does not
                describe itself and its arguments.
        """
        self.function: Callable[..., Any] = load_code(name, allow_code, folder, what="tool")
        self.schema = schema or _schema(name, self.function)
        self._loop = LoopThread()

    def answer(self, arguments: Mapping[str, Any], seconds: float | None) -> str:
        """The result as text.

        Raises:
            Refused: the function does not take these arguments.
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
    from transformers.utils import get_json_schema  # noqa: PLC0415 - the worker starts without it

    try:
        found: dict[str, Any] = get_json_schema(function)
    except Exception as error:
        raise ConfigError(
            f"tool {name}: {first_line(error)}",
            where=WHERE,
            fix="give it type hints, and a docstring with a line for each argument (Args:)",
        ) from error
    return found


def guarded(call: Callable[[], Any]) -> Any:
    """Return what ``call``, the user's code, returns. Refused and ToolkitError are raised
    unchanged; any other exception becomes Misbehaved.
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
    """``value`` as the text that the model reads. Raises Misbehaved if it is too long."""
    try:
        text = value if type(value) is str else str(value)
    except Exception as error:
        raise Misbehaved(Trouble(f"returned a value without a text: {message(error)}")) from error
    if len(text) > LONGEST_RESULT:
        what = f"returned {len(text)} characters, more than {LONGEST_RESULT}"
        raise Misbehaved(Trouble(what, text[:200]))
    # Half of a character (a lone surrogate) can be neither a token nor a line of a log.
    return text.encode(errors="backslashreplace").decode()


async def _carried(coroutine: Any) -> Any:
    """The result of ``coroutine``, or its exception, which is not raised: a SystemExit in a task
    would end the loop's thread.
    """
    try:
        return await coroutine
    except BaseException as error:  # noqa: BLE001 - carried to the caller, who decides
        return error

"""The tools of a run file: the user's functions, each call under a time limit."""

from __future__ import annotations

import asyncio
import inspect
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import get_json_schema

from toolkit.base.errors import ConfigError, first_line
from toolkit.base.time_limits import OutOfTime, call_within
from toolkit.train.rewards.user import load_code

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.config.run_config import RunConfig

WHERE = "tools.functions"


def load_tools(config: RunConfig) -> list[Callable[..., Any]]:
    """The functions that ``tools`` names, as TRL 1.16 calls them: by keyword, with what the model
    wrote. What one raises, the time limit included, is an error that the model sees.

    Raises:
        ConfigError: code that is not allowed or not there, or a function that does not describe
            itself and its arguments.
    """
    if config.tools is None:
        return []
    folder = Path(config.source).resolve().parent if config.source else Path.cwd()
    tools = []
    for name in config.tools.functions:
        function = load_code(name, config.runtime.allow_code, folder, what="tool")
        try:
            get_json_schema(function)
        except Exception as error:
            raise ConfigError(
                f"tool {name}: {first_line(error)}",
                where=WHERE,
                fix="give it type hints, and a docstring with a line for each argument (Args:)",
            ) from error
        tools.append(limited(function, config.tools.timeout_s))
    return tools


def limited(function: Callable[..., Any], seconds: float | None) -> Callable[..., Any]:
    """``function`` with its name and description; a call raises OutOfTime after ``seconds``."""
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def call_later(**arguments: Any) -> Any:
            try:
                return await asyncio.wait_for(function(**arguments), seconds)
            except TimeoutError:
                raise OutOfTime(f"took longer than {seconds:g} s") from None

        return call_later

    @wraps(function)
    def call(**arguments: Any) -> Any:
        return call_within(seconds, lambda: function(**arguments))

    return call

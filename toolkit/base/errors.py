"""The classes of the toolkit's errors, each with the exit code that schedulers act on.

An error tells the user what went wrong, where, and what to do. The command line prints it as one
block and never as a traceback; ``--debug`` shows the traceback. The drop-in API (classes with the
names and parameters of Unsloth's and TRL's) raises the subclasses that are also a ``ValueError``,
``TypeError``, ``NotImplementedError`` or ``ImportError``. So code that catches the errors of the
original classes still works.
"""

from __future__ import annotations

from typing import ClassVar

from toolkit.base.formatting import escape_unprintable

EXIT_CODES: dict[int, str] = {
    0: "ok",
    1: "the user must change the config or the request",
    2: "usage, or input that cannot be read",
    3: "this node is bad",
    4: "try again later: another process holds memory, or a race",
    5: "could not be established",
    70: "a defect of the toolkit: please report it",
    75: "stopped on purpose with a checkpoint: requeue the job",
}


class ToolkitError(Exception):
    """The base class of the toolkit's errors. ``message`` says what happened. ``where`` names the
    file, the key or the option with the problem. ``fix`` says what to do.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.message, self.where, self.fix = message, where, fix
        super().__init__(message)

    def __str__(self) -> str:
        # ``where`` may be a name from an untrusted source, so control characters are made visible.
        head = f"{escape_unprintable(self.where)}: {self.message}" if self.where else self.message
        return f"{head}\n  fix: {self.fix}" if self.fix else head


class ConfigError(ToolkitError):
    """The user must change the run file or the request."""

    exit_code = 1


class ConfigValueError(ConfigError, ValueError):
    """The drop-in API refuses a value."""


class ConfigTypeError(ConfigError, TypeError):
    """The drop-in API refuses a keyword argument, or it refuses a value because of the type."""


class UnsupportedError(ConfigError, NotImplementedError):
    """The toolkit understands the request but does not support it."""


class MissingExtraError(ConfigError, ImportError):
    """A package is missing; ``fix`` names the extra of the toolkit that installs it."""


class InputError(ToolkitError):
    """A command is used wrongly, or its input cannot be read."""

    exit_code = 2


class NodeError(ToolkitError):
    """The node is faulty and its administrator must act. The job may work on another node."""

    exit_code = 3


class RetryError(ToolkitError):
    """The config and the node have no fault; the user should try again later."""

    exit_code = 4


class UnestablishedError(ToolkitError):
    """The toolkit could not answer the user's question, such as what caused an error."""

    exit_code = 5


class StoppedError(ToolkitError):
    """The run was stopped on purpose and saved a checkpoint; the scheduler should requeue the
    job.
    """

    exit_code = 75


class DefectError(ToolkitError):
    """An internal invariant of the toolkit was violated."""

    exit_code = 70


def first_line(error: BaseException, *, longest: int = 300) -> str:
    """Return the first line of the message of another library's error, cut to ``longest``
    characters.

    If the message is empty (``MemoryError()``), return the name of the error's class. For a
    pydantic error, whose first line only counts the problems, return the messages of all problems,
    separated by semicolons.
    """
    problems = getattr(error, "errors", None)
    if callable(problems) and "validation error" in str(error):
        messages = "; ".join(
            str(problem["msg"]).removeprefix("Value error, ") for problem in problems()
        )
        return messages[:longest]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:longest]


class ToolkitWarning(UserWarning):
    """A warning about a choice that the toolkit made, or about a setting without effect. Nothing
    failed.
    """

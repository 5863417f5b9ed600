"""Convert an exception of vLLM to an error of the toolkit. If the cause is known, the error names
the check of `envcheck check` that detects this cause before a run.
"""

from __future__ import annotations

import traceback

from toolkit.base.errors import ConfigError, NodeError, ToolkitError, first_line
from toolkit.base.symptoms.errors import RESTART_ADVICE, explain_error

REJECTIONS = (ValueError, TypeError, KeyError, NotImplementedError)
VALIDATION_ERROR_NAME = "VLLMValidationError"
"""The name of vLLM's validation error, which from 0.31 on is not a ValueError. The class itself is
not used, because this module does not import vLLM.
"""


RESTART_FIX = (
    "run `envcheck check` on this node. Then run the same command again, here or on another node. "
    "The run resumes from the last checkpoint (--debug shows the whole traceback)"
)
"""The fix for a rollout that failed for an unknown reason."""


def closed_error() -> ConfigError:
    """Return the error for using an engine after ``close``."""
    return ConfigError(
        "the engine is closed", where="engine", fix="load the model again to open a new engine"
    )


def failed_earlier_error(error: ToolkitError) -> ToolkitError:
    """Return the error for using an engine that failed earlier with ``error``."""
    return type(error)(f"the engine failed earlier: {error.message}", where="engine", fix=error.fix)


def to_toolkit_error(problem: BaseException, failure: str, fix: str | None = None) -> ToolkitError:
    """Convert the exception ``problem`` to a ToolkitError.

    If the text of ``problem``, or of an exception that caused it, matches a known symptom, the
    result has the exit code and the fix of that symptom. Otherwise the result quotes the text of
    ``problem``. It is a ConfigError if vLLM rejected a value when the engine started. In all other
    cases it is a NodeError, because the config may be correct.

    Pass ``fix`` if the engine was already running. This text replaces the default fix of the
    NodeError.
    """
    if known_error := explain_error(problem, failure, RESTART_ADVICE if fix else ""):
        return known_error
    message = f"{failure}: {_text_of(problem)}"
    base_classes = type(problem).__mro__
    if fix is None and (
        isinstance(problem, REJECTIONS)
        or any(k.__name__ == VALIDATION_ERROR_NAME for k in base_classes)
    ):
        return ConfigError(message, where="vLLM", fix="change the option that vLLM names")
    fix = fix or "run `envcheck check` on this node (--debug shows the whole traceback)"
    return NodeError(message, where="vLLM", fix=fix)


def _text_of(problem: BaseException) -> str:
    """Return the class and the message of ``problem``. If the message is empty (a failed
    assertion), return the class and the line of source code that raised the exception.
    """
    name = type(problem).__name__
    if str(problem).strip():
        return f"{name}: {first_line(problem)}"
    frames = traceback.extract_tb(problem.__traceback__)
    if not frames:
        return name
    path = frames[-1].filename.rpartition("site-packages/")[2]
    return f"{name} without a message, raised at {path}:{frames[-1].lineno}"

"""An exception out of vLLM as one of our errors, by the check of the pre-flight that would have
caught it.
"""

from __future__ import annotations

from toolkit.base.errors import ConfigError, NodeError, ToolkitError, first_line
from toolkit.base.symptoms.errors import AGAIN, explained

JUDGED = (ValueError, TypeError, KeyError, NotImplementedError)
VALIDATION = "VLLMValidationError"
"""vLLM's own; no ValueError from 0.31. By name: this module does not import vLLM."""


START_AGAIN = (
    "run `envcheck check` on this node; the same command, here or on another node, resumes from the"
    " last checkpoint (--debug shows the whole traceback)"
)
"""What to do about a rollout that failed for no reason that is known."""


def closed() -> ConfigError:
    """The error of a use after ``close``."""
    return ConfigError(
        "the engine is closed", where="engine", fix="open a new one: load the model again"
    )


def died(error: ToolkitError) -> ToolkitError:
    """The error of a use of an engine that died of ``error``."""
    return type(error)(f"the engine died earlier: {error.message}", where="engine", fix=error.fix)


def explain(problem: BaseException, what: str, fix: str | None = None) -> ToolkitError:
    """``problem`` (and what caused it) as a ToolkitError with the exit code and the remedy of the
    symptom that it shows.

    Other texts are quoted: in a ConfigError where vLLM judged a value, in a NodeError otherwise, as
    nothing says that the config is at fault. ``fix`` is what to
    do where nothing was being judged: about an engine that was running.
    """
    if known := explained(problem, what, AGAIN if fix else ""):
        return known
    first = problem
    told = f"{what}: {type(first).__name__}: {first_line(first)}"
    kinds = type(first).__mro__
    if fix is None and (isinstance(first, JUDGED) or any(k.__name__ == VALIDATION for k in kinds)):
        return ConfigError(told, where="vLLM", fix="change the option that vLLM names")
    fix = fix or "run `envcheck check` on this node; --debug shows the whole traceback"
    return NodeError(told, where="vLLM", fix=fix)

"""An exception out of vLLM as one of our errors, by the check of the pre-flight that would have
caught it.
"""

from __future__ import annotations

from toolkit.base.errors import ConfigError, NodeError, RetryError, ToolkitError
from toolkit.base.symptoms import match

KINDS: dict[int, type[ToolkitError]] = {1: ConfigError, 3: NodeError, 4: RetryError}


def explain(problem: BaseException, what: str) -> ToolkitError:
    """``problem`` (and what caused it) as a ToolkitError with the exit code and the remedy of the
    symptom that it shows.

    Unknown texts become a NodeError that quotes the exception: nothing says that the config is at
        fault.
    """
    chain = list(_chain(problem))
    for error in chain:
        for symptom in match(str(error)):
            kind = KINDS.get(symptom.exit_code, NodeError)
            return kind(
                f"{what}: {symptom.title} ({_first_line(error)})",
                where=f"check {symptom.check}",
                fix=symptom.remedy,
            )
    deepest = chain[-1]
    return NodeError(
        f"{what}: {type(deepest).__name__}: {_first_line(deepest)}",
        where="vLLM",
        fix="run envcheck on this node; --debug shows the whole traceback",
    )


def _chain(problem: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = problem
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

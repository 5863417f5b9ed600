"""Turn an exception of another library into a toolkit error. The title and the remedy are those of
the known failure (``Symptom``) that the exception shows.
"""

from __future__ import annotations

from toolkit.base.errors import (
    ConfigError,
    NodeError,
    RetryError,
    ToolkitError,
    UnestablishedError,
    first_line,
)
from toolkit.base.symptoms import CONSEQUENCES, find_symptoms

ERROR_CLASSES: dict[int, type[ToolkitError]] = {
    1: ConfigError,
    3: NodeError,
    4: RetryError,
    5: UnestablishedError,
}


def exception_chain(problem: BaseException) -> list[BaseException]:
    """``problem`` and the exceptions that caused it, the outermost first."""
    chain: list[BaseException] = []
    current: BaseException | None = problem
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


RESTART_ADVICE = "then start the same command again: it resumes from the last checkpoint"
"""The advice for a fault that ended a run."""


def explain_error(problem: BaseException, what: str, advice: str = "") -> ToolkitError | None:
    """Return an error that explains ``problem``, with the exit code and the remedy of its symptom.
    Return None if no symptom matches.

    The message begins with ``what``, which says what failed. ``advice`` is added to the remedy, for
    example "then start the same command again".
    """
    for error in exception_chain(problem):
        for symptom in find_symptoms(f"{type(error).__name__}: {error}"):
            if symptom.id in CONSEQUENCES:
                continue
            return ERROR_CLASSES[symptom.exit_code](
                f"{what}: {symptom.title} ({first_line(error)})",
                where=f"check {symptom.check}" if symptom.has_check else "the run",
                fix=f"{symptom.remedy}; {advice}" if advice else symptom.remedy,
            )
    return None

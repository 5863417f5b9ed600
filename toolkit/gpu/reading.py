"""One question, one small value, three outcomes: a value, not supported here, or failed.

An unknown is never a pass: whoever reads ``value`` must say what its absence means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Reading(Generic[T_co]):
    """``value`` where the question was answered, else ``reason`` and, from NVML, its ``code``.

    ``unsupported`` tells an answer that this hardware or driver does not give (fine on many cards)
    from one that should have come and did not.
    """

    value: T_co | None = None
    reason: str | None = None
    unsupported: bool = False
    code: int | None = None

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.reason is None

    @property
    def failed(self) -> bool:
        """Whether an answer should have come and did not."""
        return self.reason is not None and not self.unsupported

    def to_json(self) -> dict[str, Any]:
        """``{"value": ...}``, ``{"unsupported": why}`` or ``{"failed": why}``, with the code."""
        if self.known:
            return {"value": self.value}
        answer: dict[str, Any] = {"unsupported" if self.unsupported else "failed": self.reason}
        return answer if self.code is None else {**answer, "code": self.code}


def of(value: T) -> Reading[T]:
    """A question that was answered."""
    return Reading(value=value)


def unsupported(reason: str, code: int | None = None) -> Reading[Any]:
    """A question that has no answer here."""
    return Reading(reason=reason, unsupported=True, code=code)


def failed(reason: str, code: int | None = None) -> Reading[Any]:
    """A question whose answer did not come."""
    return Reading(reason=reason, code=code)


NOT_ASKED: Reading[Any] = failed("not asked")


def from_json(answer: Any) -> Reading[Any]:
    """The inverse of ``Reading.to_json``.

    Raises:
        ValueError: the object is not a reading.
    """
    if isinstance(answer, dict):
        code = answer.get("code")
        if "value" in answer:
            return of(answer["value"])
        if isinstance(answer.get("unsupported"), str):
            return unsupported(answer["unsupported"], code)
        if isinstance(answer.get("failed"), str):
            return failed(answer["failed"], code)
    raise ValueError(f"not a reading: {answer!r:.80}")

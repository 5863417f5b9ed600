"""The result of one query: a value, "not supported", or "failed".

``value`` is None if the query has no value. Code that uses ``value`` must handle this case, so that
an unknown value never counts as a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Reading(Generic[T_co]):
    """The result of a query. If the query succeeded, ``value`` is the result. Otherwise ``reason``
    says why there is no value, and ``code`` is the return code of NVML if NVML was queried.

    ``unsupported`` is true if this hardware or driver does not provide the value (normal on many
    cards). It is false if the query should have worked but failed.
    """

    value: T_co | None = None
    reason: str | None = None
    unsupported: bool = False
    code: int | None = None

    @property
    def known(self) -> bool:
        """Whether this reading has a value."""
        return self.reason is None

    @property
    def failed(self) -> bool:
        """Whether the query should have worked but failed."""
        return self.reason is not None and not self.unsupported

    def to_json(self) -> dict[str, Any]:
        """Return this reading as JSON: ``{"value": ...}``, ``{"unsupported": why}`` or ``{"failed":
        why}``. ``unsupported`` and ``failed`` come with the code if there is one.
        """
        if self.known:
            return {"value": self.value}
        answer: dict[str, Any] = {"unsupported" if self.unsupported else "failed": self.reason}
        return answer if self.code is None else {**answer, "code": self.code}


def of(value: T) -> Reading[T]:
    """The reading of a query that succeeded."""
    return Reading(value=value)


def unsupported(reason: str, code: int | None = None) -> Reading[Any]:
    """The reading of a query that is not supported here."""
    return Reading(reason=reason, unsupported=True, code=code)


def failed(reason: str, code: int | None = None) -> Reading[Any]:
    """The reading of a query that failed."""
    return Reading(reason=reason, code=code)


NOT_ASKED: Reading[Any] = failed("not asked")


def from_json(answer: Any) -> Reading[Any]:
    """The inverse of ``Reading.to_json``. Raises ValueError if ``answer`` is not a reading."""
    if isinstance(answer, dict):
        code = answer.get("code")
        if "value" in answer:
            return of(answer["value"])
        if isinstance(answer.get("unsupported"), str):
            return unsupported(answer["unsupported"], code)
        if isinstance(answer.get("failed"), str):
            return failed(answer["failed"], code)
    raise ValueError(f"not a reading: {answer!r:.80}")

"""The class ``Reading``: the result of one query, which is a value, "not supported", or "failed".

Without a value, ``Reading.value`` is None. Code that uses ``Reading.value`` must handle this case,
so that an unknown value never counts as a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Reading(Generic[T_co]):
    """The result of one query. If the query succeeded, ``value`` is the result. Otherwise
    ``reason`` says why there is no value. If NVML was queried, ``code`` is NVML's return code.

    ``unsupported`` is true if this hardware or driver does not provide the value, which is normal
    on many cards. ``unsupported`` is false after a query that failed although it should have
    worked.
    """

    value: T_co | None = None
    reason: str | None = None
    unsupported: bool = False
    code: int | None = None

    @property
    def has_value(self) -> bool:
        """Whether the query succeeded, so that this Reading has a value."""
        return self.reason is None

    @property
    def failed(self) -> bool:
        """Whether the query failed although it should have worked."""
        return self.reason is not None and not self.unsupported

    def to_json(self) -> dict[str, Any]:
        """Return this Reading as JSON: ``{"value": ...}``, ``{"unsupported": reason}`` or
        ``{"failed": reason}``. If NVML returned a code, the last two also have the key ``code``.
        """
        if self.has_value:
            return {"value": self.value}
        answer: dict[str, Any] = {"unsupported" if self.unsupported else "failed": self.reason}
        return answer if self.code is None else {**answer, "code": self.code}


def succeeded(value: T) -> Reading[T]:
    """Return the Reading of a query that succeeded with ``value``."""
    return Reading(value=value)


def unsupported(reason: str, code: int | None = None) -> Reading[Any]:
    """Return the Reading of a query that this hardware or driver does not support."""
    return Reading(reason=reason, unsupported=True, code=code)


def failed(reason: str, code: int | None = None) -> Reading[Any]:
    """Return the Reading of a query that failed although it should have worked."""
    return Reading(reason=reason, code=code)


NOT_QUERIED: Reading[Any] = failed("not asked")


def reading_from_json(answer: object) -> Reading[Any]:
    """Return the Reading that ``Reading.to_json`` converted to ``answer``. Raises ValueError if
    ``answer`` is not a Reading.
    """
    if isinstance(answer, dict):
        code = answer.get("code")
        if "value" in answer:
            return succeeded(answer["value"])
        if isinstance(answer.get("unsupported"), str):
            return unsupported(answer["unsupported"], code)
        if isinstance(answer.get("failed"), str):
            return failed(answer["failed"], code)
    raise ValueError(f"not a reading: {answer!r:.80}")

"""The base of a fake C library: functions as in ctypes, handles, and recorded answers."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

SUCCESS, NOT_SUPPORTED, NOT_FOUND, INSUFFICIENT_SIZE, LOST = 0, 3, 6, 7, 15
UNKNOWN, VERSION_MISMATCH, INVALID_ARGUMENT, NO_SUCH_LIBRARY = 999, 25, 2, 12
SLICE_BASE = 1000  # handle of a card: card + 1; of a slice: SLICE_BASE * (card + 1) + slice + 1
NO_MEMORY_FIGURE = (1 << 64) - 1


class Failure(Exception):
    """An answer that is an NVML return code."""

    def __init__(self, code: int) -> None:
        self.code = code


class CFunction:
    """Like ``getattr(CDLL, name)``: a callable whose attributes a caller may set."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.body(*arguments) or SUCCESS
        except Failure as failure:
            return failure.code


def target(reference: Any) -> Any:
    """The object that a ``byref`` or a pointer argument refers to."""
    return getattr(reference, "_obj", reference)


def set_handle(reference: Any, number: int) -> None:
    """Write an opaque device handle."""
    ctypes.cast(reference, ctypes.POINTER(ctypes.c_void_p))[0] = number


def number_of(value: Any) -> int:
    """The value of a C integer argument, which may be wrapped by ctypes."""
    return int(getattr(value, "value", value))


class FunctionTable:
    """The C functions of a library for one node: methods ``c_NAME``, or functions in ``plain``.

    ``calls`` has the number of calls of each function.
    """

    plain: ClassVar[dict[str, Any]] = {}

    def __init__(self, node: dict[str, Any], quirks: dict[str, Any] | None = None) -> None:
        self.node, self.quirks = node, quirks or {}
        self.calls: dict[str, int] = {}
        self._functions: dict[str, CFunction] = {}

    def __getattr__(self, name: str) -> CFunction:
        if name.startswith("_") or name in self.quirks.get("missing", ()):
            raise AttributeError(name)
        body = getattr(type(self), f"c_{name}", None) or self.plain.get(name)
        if body is None:
            raise AttributeError(name)

        def counted(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return body(self, *arguments)

        return self._functions.setdefault(name, CFunction(counted))

    def row(self, handle: Any) -> dict[str, Any]:
        number = ctypes.cast(handle, ctypes.c_void_p).value or 0
        if number >= SLICE_BASE:
            card, part = divmod(number, SLICE_BASE)
            return dict(self.node["gpus"][card - 1]["slices"][part - 1])
        return dict(self.node["gpus"][number - 1])

    def value(self, handle: Any, name: str) -> Any:
        row = self.row(handle)
        answer = row.get(name)
        if "state" in row and "value" not in row["state"]:
            answer = row["state"]  # every reading of a lost card fails with the code in its state
        return self.unwrap(answer)

    @staticmethod
    def unwrap(answer: dict[str, Any] | None) -> Any:
        if answer is None:
            raise Failure(NOT_SUPPORTED)
        if "value" in answer:
            return answer["value"]
        raise Failure(answer.get("code", NOT_SUPPORTED if "unsupported" in answer else UNKNOWN))


def recorded(field: str, key: str | None = None) -> Any:
    """A C function ``(handle, out)`` that writes one recorded number to ``out``."""

    def body(fake: FunctionTable, handle: Any, out: Any) -> None:
        value = fake.value(handle, field)
        target(out).value = value if key is None else value[key]

    return body

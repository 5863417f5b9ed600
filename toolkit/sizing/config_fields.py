"""Read typed values from an untrusted config.json. Every value is checked and limited before
arithmetic uses it.

A size that is missing, has a wrong type, or is negative or absurd (a vocabulary of 2**60) raises
``InputError`` with the file and the key. So a hostile or truncated file causes an error message,
but never costs time or memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

# This limit is far above every dimension of a real model, and products of dimensions below it stay
# in a safe range.
MAX_DIMENSION = 1 << 24
MAX_LAYERS = 4096
MAX_EXPERTS = 1 << 14

_MISSING = object()


class Fields:
    """A mapping in config.json (the whole file, or a section), with methods that read typed values.
    ``where`` names the mapping in error messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        """Whether the key has a value (null counts as absent, as in transformers)."""
        return self.values.get(key) is not None

    def integer(
        self, *keys: str, default: object = _MISSING, low: int = 1, high: int = MAX_DIMENSION
    ) -> int:
        """The value of the first key in ``keys`` that has a value. Raises InputError if this
        value is not an int within [low, high], or if there is neither a value nor a ``default``.
        """
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
                value = int(value)
            if not isinstance(value, int) or isinstance(value, bool):
                raise self._error(key, f"must be an integer, not {_shortened(value)}")
            if not low <= value <= high:
                raise self._error(key, f"{value} is outside {low}..{high}")
            return value
        if default is _MISSING:
            raise self._error(keys[0], "is missing")
        assert isinstance(default, int)
        return default

    def number(self, key: str, *, default: float, low: float, high: float) -> float:
        """The number under ``key``, within [low, high]; the default if it is null or absent. Raises
        InputError.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._error(key, f"must be a number, not {_shortened(value)}")
        if not low <= value <= high:
            raise self._error(key, f"{_shortened(value)} is outside {low}..{high}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """The boolean under ``key``; the default if it is null or absent. Raises InputError."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error(key, f"must be true or false, not {_shortened(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """The string under ``key``, or the default. Raises InputError."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._error(key, f"must be a string, not {_shortened(value)}")
        return value

    def section(self, key: str) -> Fields | None:
        """The nested mapping under ``key``, or None if it is absent. Raises InputError if the value
        is not a mapping.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._error(key, f"must be a mapping, not {_shortened(value)}")
        return Fields(value, f"{self.where}: {key}")

    def items(self, key: str, kind: type) -> tuple[Any, ...] | None:
        """The list under ``key``, whose members all have the type ``kind``; None if it is absent.
        Raises InputError.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > MAX_EXPERTS:
            raise self._error(key, f"must be a list, not {_shortened(value)}")
        for member in value:
            if not isinstance(member, kind) or isinstance(member, bool):
                raise self._error(key, f"contains {_shortened(member)}, not {kind.__name__}")
        return tuple(value)

    def _error(self, key: str, what: str) -> InputError:
        return InputError(
            f"{key} {what}",
            where=self.where,
            fix="check that the file is the model's own config.json and is complete",
        )


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

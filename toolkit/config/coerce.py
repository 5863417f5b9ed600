"""What a text was probably meant to be: ``"1_024"`` for an integer, ``yes`` for a boolean,
``1e3`` for a number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from toolkit.config.scalars import read_core, read_legacy

if TYPE_CHECKING:
    from collections.abc import Callable


def coerce(
    text: str, schema: dict[str, Any], fault: Callable[[Any, dict[str, Any]], object | None]
) -> tuple[Any, ...]:
    """The likeliest value that ``text`` could stand for and that ``schema`` takes; empty if there
    is none.
    """
    stripped = text.strip()
    candidates = [read_core(stripped), read_legacy(stripped)[1]] if stripped else []
    candidates += [int(value) for value in candidates if isinstance(value, float) and _whole(value)]
    for value in candidates:
        if (
            value is None
            or isinstance(value, str)
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            continue
        if any(fault(value, branch) is None for branch in schema.get("x-either", [schema])):
            return (value,)
    return ()


def _whole(value: float) -> bool:
    return math.isfinite(value) and value.is_integer()

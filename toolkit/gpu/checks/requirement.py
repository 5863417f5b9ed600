"""Version requirements, as far as our own metadata uses them (PEP 440 without pre-releases)."""

from __future__ import annotations

import re
from typing import Any

from toolkit.gpu.checks.check import version_tuple


def satisfies(installed: str, requirement: str) -> bool:
    """Whether ``2.11.0`` meets ``>=2.11,<2.14``: the comparisons that our own pins use."""
    have = version_tuple(installed)
    for part in requirement.split(","):
        found = re.fullmatch(r"\s*(==|>=|<=|!=|<|>|~=)\s*([\w.+]+?)(\.\*)?\s*", part)
        if not found:
            return False
        want = version_tuple(found[2])
        width = max(len(have), len(want))
        left, right = (v + (0,) * (width - len(v)) for v in (have, want))
        if found[3]:
            left, right = have[: len(want)], want
        if not _COMPARE[found[1]](left, right, len(want)):
            return False
    return True


_COMPARE: dict[str, Any] = {
    "==": lambda a, b, _n: a == b,
    "!=": lambda a, b, _n: a != b,
    ">=": lambda a, b, _n: a >= b,
    "<=": lambda a, b, _n: a <= b,
    ">": lambda a, b, _n: a > b,
    "<": lambda a, b, _n: a < b,
    "~=": lambda a, b, n: a >= b and a[: n - 1] == b[: n - 1],
}

"""Compare versions as PEP 440 does. The module imports ``packaging`` only on first use, because the
import is slow compared with a short command. No other module imports ``packaging``.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.version import Version


@cache
def as_version(text: str) -> Version:
    """Parse a version such as ``2.13.0+cpu``, or a driver version such as ``580.159.04``, so that
    it can be compared. If PEP 440 does not allow the text (``580.65.06-server``), use only the
    numbers at its start.
    """
    from packaging.version import InvalidVersion, Version  # noqa: PLC0415 - see above

    try:
        return Version(text)
    except InvalidVersion:
        numbers = re.match(r"\d+(\.\d+)*", text)
        return Version(numbers[0] if numbers else "0")


def satisfies(installed: str, requirement: str) -> bool:
    """Whether the version ``installed`` (``2.11.0``) meets ``requirement`` (``>=2.11,<2.14``).
    False if the requirement cannot be read.
    """
    from packaging.specifiers import InvalidSpecifier, SpecifierSet  # noqa: PLC0415 - see above

    try:
        return SpecifierSet(requirement).contains(as_version(installed), prereleases=True)
    except InvalidSpecifier:
        return False

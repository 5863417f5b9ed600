"""Compare versions as PEP 440 does. Only this module imports ``packaging``. The import takes as
long as a whole command that does little, so ``packaging`` is imported only on first use.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.version import Version


@cache
def as_version(text: str) -> Version:
    """Parse a version such as ``2.13.0+cpu`` or a driver's ``580.159.04``, for comparison. If a
    text is not a version, such as ``580.65.06-server``, only the numbers at its start count.
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

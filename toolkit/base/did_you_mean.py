"""Did you mean: the known words that are most similar to a misspelled one."""

from __future__ import annotations

from difflib import SequenceMatcher, get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LONGEST = 80
EQUALLY_SIMILAR = 0.02
"""Two words whose similarity differs by less are equally similar."""


def near(
    word: str, words: Iterable[str], *, cutoff: float = 0.7, within: float = EQUALLY_SIMILAR
) -> list[str]:
    """The words that ``word`` may be a misspelling of, at most three, the most similar one first.

    Case and ``-`` or ``_`` do not matter. ``cutoff`` is the least similarity (0 to 1); ``within``
    is how much less similar than the first one the others may be.
    """
    if len(word) > _LONGEST:
        return []
    folded = {one.lower().replace("-", "_"): one for one in words}
    asked = word.lower().replace("-", "_")
    if asked in folded:
        return [folded[asked]]
    close = get_close_matches(asked, list(folded), n=3, cutoff=cutoff)
    if not close:
        return []
    ratios = [SequenceMatcher(None, one, asked).ratio() for one in close]
    return [
        folded[one] for one, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - within
    ]


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.7) -> str | None:
    """The word that ``word`` is most likely a misspelling of; None if two are equally likely."""
    close = near(word, words, cutoff=cutoff)
    return close[0] if len(close) == 1 else None

"""Find the known words that are most similar to a misspelled word ("did you mean ...")."""

from __future__ import annotations

from difflib import SequenceMatcher, get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_CHARACTERS = 80
EQUALLY_SIMILAR = 0.02
"""Two words count as equally similar if their similarities differ by less than this."""


def similar_words(
    word: str, words: Iterable[str], *, cutoff: float = 0.7, max_difference: float = EQUALLY_SIMILAR
) -> list[str]:
    """Return at most three of ``words`` that ``word`` may be a misspelling of, the most similar
    first.

    Case is ignored, and ``-`` equals ``_``. The similarity of two words is a number from 0 to 1. A
    result has at least the similarity ``cutoff``. Each result is also compared with the first (most
    similar) result: if its similarity is lower by ``max_difference`` or more, it is left out.
    """
    if len(word) > _MAX_CHARACTERS:
        return []
    words_by_normalized = {known.lower().replace("-", "_"): known for known in words}
    normalized = word.lower().replace("-", "_")
    if normalized in words_by_normalized:
        return [words_by_normalized[normalized]]
    matches = get_close_matches(normalized, list(words_by_normalized), n=3, cutoff=cutoff)
    if not matches:
        return []
    similarities = [SequenceMatcher(None, match, normalized).ratio() for match in matches]
    return [
        words_by_normalized[match]
        for match, similarity in zip(matches, similarities, strict=True)
        if similarity > similarities[0] - max_difference
    ]


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.7) -> str | None:
    """Return the word that ``word`` is most likely a misspelling of. Return None if no word is
    similar enough, or if several words are about equally similar.
    """
    similar = similar_words(word, words, cutoff=cutoff)
    return similar[0] if len(similar) == 1 else None

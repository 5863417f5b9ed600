"""Did you mean: the nearest legal word, and where a key that was looked for here really lives."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from toolkit.config.document import KeyPath, Node, dotted
from toolkit.config.finding import Fix, rename
from toolkit.config.schemas import find_schema

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST = 80


def nearest(word: str, words: Sequence[str]) -> str | None:
    """The word that ``word`` is most likely a slip of."""
    if len(word) > _LONGEST:
        return None
    folded = {one.lower().replace("-", "_"): one for one in words}
    asked = word.lower().replace("-", "_")
    if asked in folded:
        return folded[asked]
    close = get_close_matches(asked, list(folded), n=1, cutoff=0.7)
    return folded[close[0]] if close else None


def key_advice(
    key: str, parent: KeyPath, node: Node, properties: dict[str, Any]
) -> tuple[tuple[str, ...], tuple[Fix, ...]]:
    """Notes and fixes for an unknown key."""
    siblings = [name for name, below in properties.items() if "x-refused" not in below]
    close = nearest(key, siblings)
    if close is not None and node.key is not None:
        edits = () if node.source.is_override else (rename(node.source, node.key, close),)
        return (), (Fix(f"did you mean {close}?", edits),)
    elsewhere = [
        dotted((section, key))
        for section, below in find_schema("run")["properties"].items()
        if (section,) != parent and key in below.get("properties", {})
    ]
    if elsewhere:
        return (), (Fix(f"it belongs elsewhere: {elsewhere[0]}"),)
    if len(siblings) <= 12:
        named = [name for name in siblings if name.isidentifier()]
        return ("known here: " + ", ".join(named),), ()
    return (), (Fix(f"envcheck explain {dotted(parent)} lists the keys"),)

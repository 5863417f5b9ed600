"""Show characters that are not seen, or that act on what shows them."""

from __future__ import annotations

import re

# Controls but tab and line feed (a terminal obeys them), zero-width and direction characters
# (they hide or turn the text around them), and what is no character at all.
_UNSEEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff\ufff9-\uffff]"
)


def visible(text: str) -> str:
    """``text`` with such characters by their number: ``[U+202E]``. Lines and tabs stay."""
    return _UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)

"""Characters that a terminal or a browser would interpret are escaped."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.base.formatting import escape_unprintable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31mred", "[U+001B][31mred"),
        ("a\rb", "a[U+000D]b"),
        ("\u202eevil\u202c", "[U+202E]evil[U+202C]"),
        ("\x9b2J", "[U+009B]2J"),
        ("\ud800", "[U+D800]"),
        ("é 漢字 🙂 \u00a0", "é 漢字 🙂 \u00a0"),
    ],
)
def test_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    assert escape_unprintable(text) == shown


@given(st.text())
def test_no_control_character_remains(text: str) -> None:
    left = {char for char in escape_unprintable(text) if unicodedata.category(char) in ("Cc", "Cs")}
    assert left <= {"\t", "\n"}

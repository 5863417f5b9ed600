"""A printed completion cannot control the terminal."""

from __future__ import annotations

import sys
from io import StringIO

import pytest

from toolkit.cli.generate import printable


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "expected"), [(Terminal, "[U+001B]]0;x"), (StringIO, "\x1b]0;x")]
)
def test_control_characters_are_escaped_only_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, stream, expected: str
) -> None:
    monkeypatch.setattr(sys, "stdout", stream())
    assert printable("\x1b]0;x") == expected

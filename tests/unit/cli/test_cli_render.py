"""Tables fit the terminal. Colours are used only on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.cli import render

if TYPE_CHECKING:
    import pytest


def test_a_table_is_aligned_and_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = render.format_table(
        ["a", "name"], [["1", "word " * 20 + "x" * 100], ["22", ""]], right=[0]
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith(" 1  word word")
    assert lines[2].startswith("    word word")
    assert text.count("word") == 20
    assert text.count("x") == 100
    assert lines[-1] == "22"


def test_no_colours_in_a_pipe_or_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    assert render.styled("x", "red", bold=True) == "x"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert render.styled("x", "red").startswith("\x1b[31m")
    monkeypatch.setenv("NO_COLOR", "1")
    assert render.styled("x", "red") == "x"


def test_a_narrow_terminal_still_gets_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert render.terminal_width() == 80


def test_the_lines_of_a_paragraph_are_indented() -> None:
    text = render.wrap_text("word " * 60, first="fix: ", indent="     ")
    first, *rest = text.splitlines()
    assert first.startswith("fix: word")
    assert rest
    assert all(line.startswith("     word") for line in rest)

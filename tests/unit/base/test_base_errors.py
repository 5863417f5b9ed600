"""An error has a message, a location and a fix, and its exit code is in the table EXIT_CODES."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from toolkit.base import errors
from toolkit.base.errors import EXIT_CODES, ConfigError, ToolkitError, first_line

README = Path(__file__).parents[3] / "README.md"
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ToolkitError)
]


def test_an_error_reads_as_one_block() -> None:
    assert str(ConfigError("is wrong")) == "is wrong"
    whole = ConfigError("is wrong", where="run.yaml:3", fix="mend it")
    assert str(whole) == "run.yaml:3: is wrong\n  fix: mend it"


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_class_has_an_exit_code_of_the_table(kind: type[ToolkitError]) -> None:
    assert kind.exit_code in EXIT_CODES
    assert kind.exit_code != 0


def test_the_readme_lists_the_exit_codes_of_the_table() -> None:
    section = README.read_text("utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]
    assert codes == list(EXIT_CODES)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one\n"), "one"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("   "), "RuntimeError"),
        (ValueError("x" * 400), "x" * 300),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line

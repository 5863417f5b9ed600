"""The validator reads the source of a user's reward functions. It never imports them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from toolkit.config.code import find_function, is_allowed, module_file

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = """
import functools
from somewhere import imported
def plain(prompts, completions, **columns): ...
async def slow(prompts, completions, *, answer, **more): ...
def closed(prompts, completions, answer=None): ...
@functools.cache
def wrapped(x): ...
made = functools.partial(plain)
class Callable_:
    def method(self): ...
"""


def test_functions_are_read_from_source(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('this must not run')", "utf-8")
    (package / "inner.py").write_text(SOURCE, "utf-8")
    plain = find_function("pkg.inner", "plain", tmp_path)
    assert (plain.problem, plain.accepts_any_keyword, plain.required) == (
        None,
        True,
        ("prompts", "completions"),
    )
    slow = find_function("pkg.inner", "slow", tmp_path)
    assert slow.required == ("prompts", "completions", "answer")
    assert not find_function("pkg.inner", "closed", tmp_path).accepts_any_keyword
    for name in ("wrapped", "made", "imported", "Callable_"):
        found = find_function("pkg.inner", name, tmp_path)
        assert (found.problem, found.parameters) == (None, None), name
    missing = find_function("pkg.inner", "method", tmp_path)
    assert missing.problem is not None
    assert not missing.unknown
    assert find_function("pkg.other", "x", tmp_path).unknown
    (package / "broken.py").write_text("def f(:", "utf-8")
    assert "broken.py:1" in str(find_function("pkg.broken", "f", tmp_path).problem)


def test_a_file_beside_the_run_does_not_hide_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def loads(): ...", "utf-8")
    found = module_file("json", tmp_path)
    assert found is not None
    assert found.parent != tmp_path


@pytest.mark.parametrize(
    ("module", "allow", "allowed"),
    [
        ("mine", ["mine"], True),
        ("mine.a.b", ["mine"], True),
        ("mine.a", ["mine.a"], True),
        ("mine.ab", ["mine.a"], False),
        ("mine2", ["mine"], False),
        ("mine", ["mine.a"], False),
        ("os", [], False),
        ("mine", [""], False),
    ],
)
def test_allowed_modules(module: str, allow: list[str], allowed: bool) -> None:
    assert is_allowed(module, allow) is allowed

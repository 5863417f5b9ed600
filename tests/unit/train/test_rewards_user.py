"""Reward functions of the user: the module must be allowed and can be next to the run file, and the
signature is checked.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from toolkit.base.errors import ConfigError
from toolkit.config.run_config import (
    ModelSection,
    RewardFunction,
    RewardSection,
    RunConfig,
    RuntimeSection,
)
from toolkit.train.rewards import load_rewards
from toolkit.train.rewards.user_reward import RunFolderFinder, load_function

if TYPE_CHECKING:
    from pathlib import Path

GOOD = (
    "def tone(completions, answer, scale=1.0, **kwargs):\n    return [scale] * len(completions)\n"
)


@pytest.fixture(autouse=True)
def _leave_no_finders():
    before, modules = list(sys.meta_path), set(sys.modules)
    yield
    sys.meta_path[:] = before
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def rewards(tmp_path: Path, *functions: RewardFunction, allow=("mine",), columns=("answer",)):
    config = RunConfig(
        model=ModelSection(model_name="m"),
        reward=RewardSection(functions=functions),
        runtime=RuntimeSection(allow_code=allow),
        source=str(tmp_path / "run.yaml"),
    )
    return load_rewards(config, tmp_path / "out", columns=columns)


def test_a_module_next_to_the_run_file(tmp_path: Path) -> None:
    write(tmp_path, "mine.py", GOOD)
    loaded = rewards(
        tmp_path,
        RewardFunction(name="mine:tone", weight=0.2, options={"scale": 3.0}),
        RewardFunction(name="numeric_match"),
    )
    assert [function.__name__ for function in loaded.functions] == ["tone", "numeric_match"]
    assert loaded.weights == [0.2, 1.0]
    assert loaded.functions[0](prompts=["p"], completions=["c"], answer=["1"]) == [3.0]
    assert str(tmp_path) not in sys.path


def test_a_package_and_its_imports(tmp_path: Path) -> None:
    write(tmp_path, "mine/__init__.py", "")
    write(tmp_path, "mine/rewards.py", "from mine.deep import tone\n")
    write(tmp_path, "mine/deep.py", "import helper_beside\n" + GOOD)
    write(tmp_path, "helper_beside.py", "")
    function = load_function("mine.rewards:tone", ["mine", "helper_beside"], tmp_path)
    assert function.__module__ == "mine.deep"


def test_code_of_a_module_that_is_not_allowed_is_not_run(tmp_path: Path) -> None:
    write(tmp_path, "evil.py", f"open({str(tmp_path / 'run')!r}, 'w')\n{GOOD}")
    with pytest.raises(ConfigError, match=r"allow_code does not list[\s\S]*allow_code: \[evil\]"):
        load_function("evil:tone", ["mine"], tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_file_next_to_the_run_file_cannot_replace_another_module(tmp_path: Path) -> None:
    """The file is imported neither in place of a module of the standard library, even if that name
    is allowed, nor for a module that is not allowed.
    """
    for name in ("json", "fractions", "helper_evil"):
        write(tmp_path, f"{name}.py", "raise SystemExit('evil')")
    write(tmp_path, "mine.py", "import json, fractions\n" + GOOD)
    before = list(sys.meta_path)
    load_function("mine:tone", ["mine", "fractions", "json"], tmp_path)
    assert sys.modules["json"] is json
    finders = [
        finder
        for finder in sys.meta_path
        if isinstance(finder, RunFolderFinder) and finder not in before
    ]
    assert [finder.top_module for finder in finders] == ["mine"]
    write(tmp_path, "mine2.py", "import helper_evil\n" + GOOD)
    with pytest.raises(
        ConfigError, match=r"module helper_evil, which was not found[\s\S]*allow it"
    ):
        load_function("mine2:tone", ["mine2"], tmp_path)


@pytest.mark.parametrize(
    "name",
    ["mine", "mine:", ":tone", "../mine:tone", "/etc/mine:tone", "mine:tone()", "mine:a.b",
     "mine :tone", "mine:to ne", "mine..x:tone", "mine:tone\n", "1mine:tone"],
)  # fmt: skip
def test_malformed_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        rewards(tmp_path, RewardFunction(name=name), allow=("mine", "..", "/etc/mine"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def tones(**kwargs): ...", "tone does not exist in mine[\\s\\S]*did you mean tones"),
        ("x = 1", "tone does not exist in mine[\\s\\S]*define the function in the module"),
        ("tone = 5", "tone is not a function in mine"),
        ("def tone(:", "mine.py:1: reward mine:tone: invalid syntax"),
        ("1 / 0", "importing mine raised ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "importing mine raised SystemExit"),
        ("import not_there_at_all", "needs the module not_there_at_all"),
        ("def tone(prompts, completions): ...", "add \\*\\*kwargs"),
        ("def tone(completions, /, **kwargs): ...", "called by keyword"),
        ("def tone(completions, solution, **kwargs): ...", "the column solution[.] .* answer"),
        ("def tone(completions, x, y, **kwargs): ...", "needs the columns x, y"),
    ],
)
def test_unusable_modules_are_explained(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path, "mine.py", content)
    with pytest.raises(ConfigError, match=message):
        rewards(tmp_path, RewardFunction(name="mine:tone"))


def test_a_module_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the module mine does not exist[\s\S]*put mine.py next to the run file"
    ):
        rewards(tmp_path, RewardFunction(name="mine:tone"))


def test_the_name_of_a_file_instead_of_a_module(tmp_path: Path) -> None:
    write(tmp_path, "mine.py", GOOD)
    with pytest.raises(ConfigError, match=r"mine.py is a file[\s\S]*fix: write mine without .py"):
        rewards(tmp_path, RewardFunction(name="mine.py:tone"))


def test_an_option_that_is_also_a_column(tmp_path: Path) -> None:
    write(tmp_path, "mine.py", GOOD)
    with pytest.raises(ConfigError, match="option answer is also a dataset column"):
        rewards(tmp_path, RewardFunction(name="mine:tone", options={"answer": 1}))


def test_a_built_in_reward_without_its_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"exact_match needs the column answer[.] .* gold"):
        rewards(tmp_path, RewardFunction(name="exact_match"), columns=("prompt", "gold"))


def test_every_reward_has_a_unique_name(tmp_path: Path) -> None:
    write(tmp_path, "mine.py", GOOD)
    write(tmp_path, "other.py", GOOD)
    loaded = rewards(
        tmp_path,
        RewardFunction(name="mine:tone"),
        RewardFunction(name="other:tone"),
        RewardFunction(name="format", options={"tags": ["a"]}),
        RewardFunction(name="format", options={"tags": ["b"]}),
        allow=("mine", "other"),
    )
    names = [function.__name__ for function in loaded.functions]
    assert names == ["mine:tone", "other:tone", "format_1", "format_2"]

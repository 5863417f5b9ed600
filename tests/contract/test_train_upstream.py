"""The files and functions that train/upstream_errors names exist in the installed packages."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from toolkit.config.libraries import package_folder
from toolkit.config.schemas import find_schema
from toolkit.train.upstream_errors import UPSTREAM_TASKS

pytestmark = pytest.mark.contract
CODE_LOCATIONS = sorted({location for phase in UPSTREAM_TASKS for location in phase.locations})
GRPO = find_schema("run")["properties"]["grpo"]["properties"]


@cache
def function_names(package: str, file: str) -> set[str] | None:
    """The names of all functions in a file; None if there is no such file."""
    folder = package_folder(package)
    assert folder is not None
    path = folder / file
    if not path.is_file():
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("location", CODE_LOCATIONS)
def test_a_named_file_or_function_exists(location: str) -> None:
    path, _, function = location.partition(":")
    package, _, file = path.partition("/")
    folder = package_folder(package)
    if folder is None:
        pytest.skip(f"{package} is not installed")
    if path.endswith("/"):
        assert (folder / file).is_dir()
        return
    names = function_names(package, file)
    assert names is not None, f"{path} does not exist"
    assert not function or function in names, f"{function} is no longer in {path}"


def test_the_keys_of_a_phase_are_keys_of_grpo() -> None:
    for phase in UPSTREAM_TASKS:
        for key in phase.keys or ():
            assert key in GRPO, f"{phase.description}: {key}"

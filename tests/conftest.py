"""The order of the tests: test files that import vLLM into the test process run last.

vLLM changes its process: the factory of log records, classes of transformers, and registered
configs. All other tests run before, in a process without vLLM. (`just test` gives files to workers
in this order.)
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis

if TYPE_CHECKING:
    import pytest

# On a busy machine, hypothesis' deadline would fail tests of correct code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Run files of the fixtures extend a base file in another folder. This variable allows that.
os.environ["TOOLKIT_EXTENDS_FROM"] = str(Path(__file__).parent / "fixtures")

IMPORTS_VLLM = re.compile(
    r"import vllm\b|from vllm\b|importorskip\(.vllm|open_engine|pytest\.mark\.engine"
)


@cache
def changes_the_process(path: Path) -> bool:
    """Whether a test file imports vLLM into this process, according to its folder or its text."""
    return path.parent.name == "engine" or IMPORTS_VLLM.search(path.read_text()) is not None


def position_in_suite(item: pytest.Item) -> int:
    """0: tests that need a process without vLLM. 1: the tests of model families, which load every
    architecture with transformers and with vLLM, and so run before the other tests of vLLM. 2: the
    other tests of vLLM.
    """
    if not changes_the_process(item.path):
        return 0
    return 1 if item.path.name == "test_engine_families.py" else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests. The sort is stable, so the tests of a file stay together."""
    items.sort(key=position_in_suite)

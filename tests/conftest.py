"""Order of the suite: what imports vLLM into the test process runs last.

vLLM changes its process: the factory of log records, classes of transformers, configs registered
under their names. Tests of everything else see a process that it has not been in. (`just test`
hands files to workers in this order.)
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

# A busy machine is no fault of what is tested.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# The fixtures share a base in a folder beside them, as the user of a tree of run files may.
os.environ["TOOLKIT_EXTENDS_FROM"] = str(Path(__file__).parent / "fixtures")

IMPORTS_VLLM = re.compile(
    r"import vllm\b|from vllm\b|importorskip\(.vllm|open_engine|pytest\.mark\.engine"
)


@cache
def changes_the_process(path: Path) -> bool:
    """Whether a test file brings vLLM into this process, as far as its text tells."""
    return path.parent.name == "engine" or IMPORTS_VLLM.search(path.read_text()) is not None


def place(item: pytest.Item) -> int:
    """0: what needs an untouched process. 1: the families, which load every architecture with
    transformers beside vLLM and so come before the rest of vLLM's tests. 2: that rest.
    """
    if not changes_the_process(item.path):
        return 0
    return 1 if item.path.name == "test_engine_families.py" else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable: within each part the order stays, so files stay whole."""
    items.sort(key=place)

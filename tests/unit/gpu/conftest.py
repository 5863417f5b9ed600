"""The fakes on the path, and pynvml put back after a test has replaced its library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))


@pytest.fixture
def pynvml_library() -> Iterator[Any]:
    """pynvml, whose loaded library and function cache are restored afterwards."""
    import pynvml

    library = pynvml.nvmlLib
    yield pynvml
    pynvml.nvmlLib = library
    pynvml._nvmlGetFunctionPointer_cache.clear()

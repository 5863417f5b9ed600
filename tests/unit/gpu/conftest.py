"""Put tests/fakes on sys.path, and restore pynvml after a test that has replaced its library."""

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
    """pynvml. Its loaded library is restored and its function cache is cleared after the test."""
    import pynvml

    library = pynvml.nvmlLib
    yield pynvml
    pynvml.nvmlLib = library
    pynvml._nvmlGetFunctionPointer_cache.clear()

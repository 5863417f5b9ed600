"""The first usage example of the drop-in API, as users write it, with the vLLM engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from test_drop_in_examples import END, FIRST, LOAD, TRAIN, _run, folder  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.engine, pytest.mark.slow]
pytest.importorskip("vllm")


def test_the_first_example_with_an_engine(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    values = {"folder": str(folder), "bits": False, "fast": True, "share": 0.5}
    result = _run(LOAD + FIRST + TRAIN + END, tmp_path, **values)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "True 64"
    assert "Traceback" not in result.stderr

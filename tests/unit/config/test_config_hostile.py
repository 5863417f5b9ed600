"""No input crashes the validator: a short draw of what the fuzz script draws at length."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def fuzz_script() -> Any:
    """The script as a module."""
    path = Path(__file__).parents[2] / "fuzz" / "fuzz_run_file.py"
    spec = importlib.util.spec_from_file_location("fuzz_run_file", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


FUZZ = fuzz_script()


@settings(deadline=None, max_examples=250, suppress_health_check=list(HealthCheck))
@given(
    FUZZ.INPUT, st.sampled_from(FUZZ.SUFFIXES), st.sampled_from(list(FUZZ.PRINTERS)), FUZZ.OVERRIDE
)
def test_any_input_gives_an_exit_code_and_soon(
    data: bytes, suffix: str, form: str, override: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"run{suffix}"
        path.write_bytes(data)
        assert FUZZ.judge(path, form, override) < FUZZ.SECONDS_EACH

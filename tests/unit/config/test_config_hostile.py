"""No input crashes the validator. The fuzz script tests more inputs of the same kind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import fuzz_run_file as fuzz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=250, suppress_health_check=list(HealthCheck))
@given(
    fuzz.INPUT, st.sampled_from(fuzz.SUFFIXES), st.sampled_from(list(fuzz.PRINTERS)), fuzz.OVERRIDE
)
def test_any_input_ends_with_an_exit_code_in_time(
    data: bytes, suffix: str, form: str, override: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"run{suffix}"
        path.write_bytes(data)
        assert fuzz.check_input(path, form, override) < fuzz.MAX_SECONDS_PER_INPUT

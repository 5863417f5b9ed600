"""No data file, archive or adapter crashes its reader. The test runs each fuzz script for a short
round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import fuzz_adapters
import fuzz_archives
import fuzz_data
import fuzz_loop
import pytest

if TYPE_CHECKING:
    from types import ModuleType

INPUTS = 200


@pytest.mark.parametrize(
    "script", [fuzz_data, fuzz_archives, fuzz_adapters], ids=lambda script: script.__name__
)
@pytest.mark.filterwarnings("ignore")
def test_any_file_is_read_or_refused_quickly(script: ModuleType) -> None:
    inputs, longest, _ = script.run_round((INPUTS, 1))
    assert inputs >= INPUTS / 2
    assert longest < fuzz_loop.MAX_SECONDS_PER_INPUT

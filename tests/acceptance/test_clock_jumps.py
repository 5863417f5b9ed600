"""The clock (``time.time``) jumps by years, forward and back, while a run trains. The results do
not depend on the clock.
"""

from __future__ import annotations

import time

import pytest
import train_world as world
from test_run_lost import at_step

pytestmark = pytest.mark.slow
YEARS = 30 * 365 * 86400.0


def test_a_changed_clock_changes_no_byte_of_the_results(tmp_path):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    run_file = world.make_run_files(tmp_path / "w", steps=3)
    plain = world.fork_run(run_file, tmp_path / "plain.txt")
    assert world.wait_for_exit(plain) == 0
    expected = world.result_digests(run_file.parent / "run")
    run_dir, clock = tmp_path / "run", time.time

    def jump():
        jumps = iter([YEARS, -YEARS, 0.0] * 100_000)
        time.time = lambda: clock() + next(jumps)

    out = tmp_path / "out.txt"
    pid = world.fork_run(run_file, out, f'runtime.output_dir="{run_dir}"', before=at_step(1, jump))
    assert world.wait_for_exit(pid) == 0, out.read_text()
    assert world.result_digests(run_dir) == expected
    timings = world.read_rows(run_dir, "timings.jsonl")
    assert all(0 <= row["step_s"] < 3600 for row in timings), timings
    assert "-" not in out.read_text().split("s left")[0].rsplit("tok/s", 1)[-1]

"""Killed at any point and started again, a run ends with the bytes of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import train_world as world

STEPS = 8


@pytest.fixture(
    scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.engine)]
)
def undisturbed(request, tmp_path_factory):
    """(run file, digests, seconds of the training part) of a run that nobody disturbs."""
    import toolkit.train.run  # noqa: F401 - before the forks

    if request.param == "vllm":
        pytest.importorskip("vllm")
    run_file = world.make(tmp_path_factory.mktemp("w"), engine=request.param, steps=STEPS)
    out = run_file.parent / "whole.txt"
    begin = time.monotonic()
    code = world.wait(world.forked(run_file, out))
    assert code == 0, out.read_text()
    return run_file, world.digests(run_file.parent / "run"), time.monotonic() - begin, request.param


def kill_and_resume(undisturbed, tmp_path, points: int) -> None:
    run_file, expected, seconds, engine = undisturbed
    generator = random.Random(11)
    killed = 0
    for point in range(points):
        run_dir = tmp_path / f"run-{point}"
        override = f'runtime.output_dir="{run_dir}"'
        pid = world.forked(run_file, tmp_path / "killed.txt", override)
        # Anywhere in the run: after some row was written, and some time more.
        row = generator.randrange(0, STEPS)
        until = time.monotonic() + 4 * seconds + 30
        while len(world.rows_or_none(run_dir)) < row and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(generator.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        killed += world.wait(pid) == -signal.SIGKILL
        out = tmp_path / f"resumed-{point}.txt"
        assert world.wait(world.forked(run_file, out, override)) == 0, out.read_text()
        assert world.digests(run_dir) == expected, (point, row, engine, out.read_text())
    assert killed >= points * 0.6


def test_killed_and_resumed(undisturbed, tmp_path):
    kill_and_resume(undisturbed, tmp_path, 4 if undisturbed[3] == "transformers" else 1)


@pytest.mark.slow
def test_killed_at_25_points_and_resumed(undisturbed, tmp_path):
    kill_and_resume(undisturbed, tmp_path, 25)

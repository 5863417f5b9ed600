"""A run gets two hundred mixed signals in one of its phases. It prints at most one error, exits
with a documented code and leaves no partly written file. The same command then finishes the run
with the same result.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import run_phases as phases
import train_world as world
from train_world import default_hang_up_handler  # noqa: F401 - a fixture

from toolkit.train.checkpointing import checkpoint

pytestmark = pytest.mark.slow
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STOPPED, AT_ONCE = 75, 130


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    run_file = world.make_run_files(tmp_path_factory.mktemp("w"), steps=4)
    assert (
        world.wait_for_exit(world.fork_run(run_file, run_file.parent / "out.txt", evaluate=True))
        == 0
    )
    return run_file, world.result_digests(run_file.parent / "run")


def long_phase(phase):
    """A hook that lengthens the first occurrence of ``phase`` by one second of short sleeps."""

    def install():
        left = [1.0]

        def around(said, call):
            if said == phase and left[0] > 0:
                os.write(2, b"here\n")
                while left[0] > 0:
                    left[0] -= 0.02
                    time.sleep(0.02)
            return call()

        phases.wrap_phase("held out" if phase.startswith("evaluation ") else phase, around)

    return install


def send_many_signals(process, generator, count=200):
    for _ in range(count):
        process.send_signal(generator.choice(SIGNALS))
        time.sleep(generator.random() * 0.006)
        if process.poll() is not None:
            return
    while process.poll() is None:  # until the process ends
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)


@pytest.mark.parametrize("phase", phases.PHASES)
def test_many_signals_in_a_phase_leave_a_run_that_resumes(undisturbed, tmp_path, phase):
    run_file, expected = undisturbed
    run_dir = tmp_path / "run"
    generator = random.Random(phase)
    words = (run_file, "--output-dir", run_dir, "--evaluate")
    more = () if phase != "evaluation" else ("--set", "grpo.eval_strategy=steps")
    process = world.Command(*words, *more, before=long_phase(phase))
    assert os.read(process.err, 5) == b"here\n"
    send_many_signals(process, generator)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (STOPPED, AT_ONCE), err
    assert err.count("error: ") == (process.returncode == STOPPED), err
    assert "Traceback" not in err
    assert list(run_dir.glob(".checkpoint-*")) == []
    assert all(checkpoint.find_faults(folder) == [] for folder in run_dir.glob("checkpoint-*"))
    if phase == "evaluation":
        return
    again = world.fork_run(
        run_file, tmp_path / "again.txt", f'runtime.output_dir="{run_dir}"', evaluate=True
    )
    assert world.wait_for_exit(again) == 0, (tmp_path / "again.txt").read_text()
    assert world.result_digests(run_dir) == expected
    assert {path.name for path in run_dir.glob(".*")} == {".lock", ".branch.json"}


def test_many_signals_while_the_command_is_loaded(undisturbed, tmp_path):
    """The signals come during the imports, or while the run file or the model is loaded."""
    run_file, _ = undisturbed
    for seed in range(3):
        run_dir = tmp_path / f"run-{seed}"
        process = subprocess.Popen(
            [world.BIN / "toolkit", "train", run_file, "--output-dir", run_dir],
            env=world.command_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        status = Path(f"/proc/{process.pid}/status")
        world.wait_for(lambda status=status: _catches(status.read_text()))
        time.sleep(seed)
        send_many_signals(process, random.Random(seed))
        _, err = process.communicate(timeout=120)
        assert process.returncode in (STOPPED, AT_ONCE), err
        assert err.count("error: ") <= 1, err
        assert "Traceback" not in err, err


def _catches(status):
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return all(caught >> (one - 1) & 1 for one in SIGNALS)

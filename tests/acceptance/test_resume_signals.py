"""A signal in any phase of a run leads to the documented exit code and files. The run that is
started again ends with the same result.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import run_phases as phases
import train_world as world

from toolkit.train.checkpointing import checkpoint

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    run_file = world.make_run_files(tmp_path_factory.mktemp("w"))
    often = "save_steps: 2\n  eval_strategy: steps\n  eval_steps: 3"
    run_file.write_text(run_file.read_text().replace("save_steps: 2", often))
    assert (
        world.wait_for_exit(world.fork_run(run_file, run_file.parent / "out.txt", evaluate=True))
        == 0
    )
    return run_file, world.result_digests(run_file.parent / "run")


def slow_phase(phase: str):
    """A hook that prints and waits 30 s in ``phase``, once two steps are done."""

    def install():
        from toolkit.train.checkpointing import stop_signals
        from toolkit.train.trainer import GRPOTrainer

        stop_signals.GRACE_S = 0.3

        def wrap(owner, name):
            original = getattr(owner, name)

            def slowly(*args, **kwargs):
                trainer = args[0]
                trainer = getattr(trainer, "trainer", trainer)
                if trainer.state.global_step >= 2:
                    end = time.monotonic() + 30
                    os.write(1, f"in {phase}\n".encode())
                    while time.monotonic() < end:
                        time.sleep(0.05)
                return original(*args, **kwargs)

            setattr(owner, name, slowly)

        if phase == "rollout":
            wrap(GRPOTrainer, "_generate_single_turn")
        elif phase == "reward":
            wrap(GRPOTrainer, "_calculate_rewards")
        elif phase == "training step":
            wrap(GRPOTrainer, "_compute_loss")

    return install


@pytest.mark.parametrize("phase", ["rollout", "reward", "training step"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_step_that_is_too_long_is_abandoned(undisturbed, tmp_path, phase, number):
    run_file, expected = undisturbed
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"
    override = f'runtime.output_dir="{run_dir}"'
    pid = world.fork_run(run_file, out, override, before=slow_phase(phase))
    world.wait_for(lambda: out.exists() and f"in {phase}" in out.read_text())
    sent = time.monotonic()
    os.kill(pid, number)
    assert world.wait_for_exit(pid) == 75, out.read_text()
    assert time.monotonic() - sent < 20
    assert f"stopped by {number.name}; checkpoint-2 was saved" in out.read_text()
    assert checkpoint.list_steps(run_dir) == [2]
    assert checkpoint.find_faults(run_dir / "checkpoint-2") == []
    assert world.wait_for_exit(world.fork_run(run_file, out, override)) == 0, out.read_text()
    assert world.result_digests(run_dir) == expected


def test_a_signal_between_steps_saves_at_the_end_of_the_step(undisturbed, tmp_path):
    run_file, expected = undisturbed
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"
    override = f'runtime.output_dir="{run_dir}"'
    pid = world.fork_run(run_file, out, override)
    world.wait_for(lambda: len(world.raw_rows(run_dir)) >= 3)
    os.kill(pid, signal.SIGTERM)
    code = world.wait_for_exit(pid)
    if code == 75:
        steps = checkpoint.list_steps(run_dir)
        assert checkpoint.find_faults(run_dir / f"checkpoint-{steps[0]}") == []
        assert f"checkpoint-{steps[0]} was saved" in out.read_text()
        assert sum("loss" in row for row in world.read_rows(run_dir)) == steps[0]
        assert world.wait_for_exit(world.fork_run(run_file, out, override)) == 0, out.read_text()
    assert world.result_digests(run_dir) == expected


def test_a_second_interrupt_stops_at_once(undisturbed, tmp_path):
    run_file, _ = undisturbed
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"
    override = f'runtime.output_dir="{run_dir}"'

    def stubborn():
        slow_phase("rollout")()
        from toolkit.train.checkpointing import stop_signals

        stop_signals.GRACE_S = 60

    pid = world.fork_run(run_file, out, override, before=stubborn)
    world.wait_for(lambda: out.exists() and "in rollout" in out.read_text())
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    sent = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert world.wait_for_exit(pid) == 130
    assert time.monotonic() - sent < 10
    assert checkpoint.find_faults(run_dir / "checkpoint-2") == []


def test_a_signal_during_loading_ends_the_run_at_once(undisturbed, tmp_path):
    run_file, _ = undisturbed
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"

    def loading():
        from toolkit.train import run

        def forever(*_):
            os.write(1, b"loading\n")
            time.sleep(60)

        run.load_policy = forever

    pid = world.fork_run(run_file, out, f'runtime.output_dir="{run_dir}"', before=loading)
    world.wait_for(lambda: out.exists() and "loading" in out.read_text())
    os.kill(pid, signal.SIGTERM)
    assert world.wait_for_exit(pid) == 75
    assert "no step was completed yet" in out.read_text()


def slow_outside_of_steps(phase: str):
    """A hook that prints and waits in a phase outside of the steps: in an evaluation during a step
    when it samples, in all other phases before they begin.
    """

    def install():
        from toolkit.train.checkpointing import stop_signals

        stop_signals.GRACE_S = 0.3

        def around(said, call):
            if said != phase:
                return call()
            os.write(1, f"in {phase}\n".encode())
            end = time.monotonic() + (2 if phase == "checkpoint" else 30)
            while time.monotonic() < end:
                time.sleep(0.05)
            return call()

        name = "held out" if phase.startswith("evaluation ") else phase
        phases.wrap_phase(name, around)

    def install_evaluation():
        from toolkit.train.checkpointing import stop_signals
        from toolkit.train.trainer import GRPOTrainer

        stop_signals.GRACE_S = 0.3
        original = GRPOTrainer._generate_single_turn

        def slowly(trainer, *args, **kwargs):
            if not trainer.model.training:
                os.write(1, b"in evaluation\n")
                time.sleep(30)
            return original(trainer, *args, **kwargs)

        GRPOTrainer._generate_single_turn = slowly

    return install_evaluation if phase == "evaluation" else install


@pytest.mark.parametrize(
    ("phase", "number", "saved"),
    [
        ("load", signal.SIGINT, None),
        ("evaluation before", signal.SIGTERM, None),
        ("evaluation", signal.SIGUSR1, 3),
        ("checkpoint", signal.SIGTERM, 3),
        ("evaluation after", signal.SIGINT, 8),
        ("end", signal.SIGTERM, 8),
    ],
)
def test_a_signal_outside_of_steps_saves_what_was_trained(
    undisturbed, tmp_path, phase, number, saved
):
    """Steps that are in no checkpoint yet are saved. A checkpoint that is being written is
    finished first.
    """
    run_file, expected = undisturbed
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"
    override = f'runtime.output_dir="{run_dir}"'
    slowly = slow_outside_of_steps(phase)
    pid = world.fork_run(run_file, out, override, before=slowly, evaluate=True)
    world.wait_for(lambda: out.exists() and f"in {phase}" in out.read_text())
    sent = time.monotonic()
    os.kill(pid, number)
    assert world.wait_for_exit(pid) == 75, out.read_text()
    assert time.monotonic() - sent < 20
    steps = checkpoint.list_steps(run_dir)
    if phase == "checkpoint" and steps[:1] == [2]:
        saved = 2  # on a busy machine, step 3 took longer than GRACE_S and was abandoned
    written = "no step was completed yet" if saved is None else f"checkpoint-{saved} was saved"
    assert f"stopped by {number.name}; {written}" in out.read_text()
    assert steps[:1] == ([] if saved is None else [saved])
    assert all(checkpoint.find_faults(run_dir / f"checkpoint-{step}") == [] for step in steps)
    assert list(run_dir.glob(".checkpoint-*")) == []
    assert world.wait_for_exit(world.fork_run(run_file, out, override, evaluate=True)) == 0, (
        out.read_text()
    )
    assert world.result_digests(run_dir) == expected
    assert (run_dir / "report.html").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_command_line_is_read_ends_with_its_exit_code(tmp_path, number):
    """The signal is sent as soon as its handler is installed. The run file is a named pipe without
    a writer, so the command does not end before the signal.
    """
    os.mkfifo(tmp_path / "run.yaml")
    process = subprocess.Popen(
        [world.BIN / "toolkit", "train", "run.yaml"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=world.command_environment(),
    )
    status = Path(f"/proc/{process.pid}/status")
    world.wait_for(lambda: catches(status.read_text(), number))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.startswith(f"error: stopped by {number.name} before the run began")


def catches(status: str, number: int) -> bool:
    """Whether a process has handlers for ``number`` and SIGTERM (Python itself handles SIGINT)."""
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return all(caught >> (one - 1) & 1 for one in (number, signal.SIGTERM))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_during_the_imports_ends_with_its_exit_code(undisturbed, tmp_path, number):
    run_file, _ = undisturbed
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [world.BIN / "toolkit", "train", str(run_file), "--output-dir", str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=world.command_environment(),
    )
    maps = Path(f"/proc/{process.pid}/maps")
    world.wait_for(lambda: "libtorch_cpu" in maps.read_text())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert out == ""
    assert f"stopped by {number.name} before the run began" in err
    assert "Traceback" not in err
    assert not run_dir.exists()

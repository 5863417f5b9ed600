"""A signal in every phase: the promised exit code, the promised files, and the same end."""

from __future__ import annotations

import os
import signal
import time

import pytest
import train_world as world

from toolkit.train import checkpoint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - before the forks

    run_file = world.make(tmp_path_factory.mktemp("w"))
    assert world.wait(world.forked(run_file, run_file.parent / "out.txt")) == 0
    return run_file, world.digests(run_file.parent / "run")


def slow(phase: str):
    """Make a phase of the run slow enough to be hit, from the second step on."""

    def install():
        from toolkit.train import metrics, resumable, signals
        from toolkit.train.trainer import GRPOTrainer

        signals.GRACE_S = 0.3

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
        del metrics, resumable

    return install


@pytest.mark.parametrize("phase", ["rollout", "reward", "training step"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_step_that_is_too_long_is_abandoned(undisturbed, tmp_path, phase, number):
    run_file, expected = undisturbed
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"
    override = f'runtime.output_dir="{run_dir}"'
    pid = world.forked(run_file, out, override, before=slow(phase))
    world.wait_for(lambda: out.exists() and f"in {phase}" in out.read_text())
    sent = time.monotonic()
    os.kill(pid, number)
    assert world.wait(pid) == 75, out.read_text()
    assert time.monotonic() - sent < 20
    assert f"stopped by {number.name}; checkpoint-2 is written" in out.read_text()
    assert checkpoint.list_steps(run_dir) == [2]
    assert checkpoint.faults(run_dir / "checkpoint-2") == []
    assert world.wait(world.forked(run_file, out, override)) == 0, out.read_text()
    assert world.digests(run_dir) == expected


def test_a_signal_between_steps_saves_at_the_end_of_the_step(undisturbed, tmp_path):
    run_file, expected = undisturbed
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"
    override = f'runtime.output_dir="{run_dir}"'
    pid = world.forked(run_file, out, override)
    world.wait_for(lambda: len(world.rows_or_none(run_dir)) >= 3)
    os.kill(pid, signal.SIGTERM)
    code = world.wait(pid)
    if code == 75:
        steps = checkpoint.list_steps(run_dir)
        assert checkpoint.faults(run_dir / f"checkpoint-{steps[0]}") == []
        assert f"checkpoint-{steps[0]} is written" in out.read_text()
        assert len(world.rows(run_dir)) == steps[0]
        assert world.wait(world.forked(run_file, out, override)) == 0, out.read_text()
    assert world.digests(run_dir) == expected


def test_a_second_interrupt_stops_at_once(undisturbed, tmp_path):
    run_file, _ = undisturbed
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"
    override = f'runtime.output_dir="{run_dir}"'

    def stubborn():
        slow("rollout")()
        from toolkit.train import signals

        signals.GRACE_S = 60

    pid = world.forked(run_file, out, override, before=stubborn)
    world.wait_for(lambda: out.exists() and "in rollout" in out.read_text())
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    sent = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert world.wait(pid) == 130
    assert time.monotonic() - sent < 10
    assert checkpoint.faults(run_dir / "checkpoint-2") == []


def test_while_loading_there_is_nothing_to_wait_for(undisturbed, tmp_path):
    run_file, _ = undisturbed
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"

    def loading():
        from toolkit.train import run

        def forever(*_):
            os.write(1, b"loading\n")
            time.sleep(60)

        run.load_policy = forever

    pid = world.forked(run_file, out, f'runtime.output_dir="{run_dir}"', before=loading)
    world.wait_for(lambda: out.exists() and "loading" in out.read_text())
    os.kill(pid, signal.SIGTERM)
    assert world.wait(pid) == 75
    assert "no step had ended yet" in out.read_text()

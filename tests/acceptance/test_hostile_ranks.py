"""Runs of two ranks. One rank is stopped by SIGSTOP, runs out of memory, or cannot write a file."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time

import pytest
import rank_world as ranks
import train_world as world

from toolkit.train.checkpointing import branch, checkpoint

pytestmark = pytest.mark.slow
HALF = "grpo.per_device_train_batch_size=4"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    made = world.make_run_files(tmp_path_factory.mktemp("w"), steps=6)
    (made.parent / "my_rewards.py").write_text(ranks.SLOW_REWARDS)
    return made


@pytest.fixture(scope="module")
def expected(run_file):
    run_dir = run_file.parent / "whole"
    pids = ranks.start_ranks(run_file, run_dir, HALF)
    assert [world.wait_for_exit(pid) for pid in pids] == [0, 0], ranks.printed_by_ranks(run_dir)
    return world.result_digests(run_dir)


def resume_and_digest(run_file, run_dir):
    pids = ranks.start_ranks(run_file, run_dir, HALF)
    assert [world.wait_for_exit(pid) for pid in pids] == [0, 0], ranks.printed_by_ranks(run_dir)
    return world.result_digests(run_dir)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_ends_the_others_in_time(run_file, expected, tmp_path, victim):
    """SIGSTOP simulates a debugger or a frozen node. The collective of the other rank times out."""
    run_dir = tmp_path / "run"
    pids = ranks.start_ranks(run_file, run_dir, HALF, "grpo.ddp_timeout=5")
    world.wait_for(lambda: len(world.raw_rows(run_dir)) >= 3)
    os.kill(pids[victim], signal.SIGSTOP)
    begin = time.monotonic()
    code = world.wait_for_exit(pids[1 - victim], timeout=90)
    took = time.monotonic() - begin
    output = ranks.output_path(run_dir, 1 - victim).read_text()
    os.kill(pids[victim], signal.SIGKILL)
    world.wait_for_exit(pids[victim])
    assert code == 4, output
    assert output.count("error: ") == 1, output
    assert "of this run has ended unexpectedly" in output
    assert "raise grpo.ddp_timeout" in output
    assert "Traceback" not in output
    assert took < 60
    assert resume_and_digest(run_file, run_dir) == expected


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", ["load_policy", "_evaluate"])
def test_ranks_do_not_wait_for_a_rank_that_is_stopped_before_the_first_step(
    run_file, tmp_path, victim, phase
):
    run_dir = tmp_path / "run"

    def before(number):
        if number == victim:
            from toolkit.train import run

            setattr(run, phase, lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP))

    pids = ranks.start_ranks(run_file, run_dir, HALF, "grpo.ddp_timeout=8", before=before)
    code = world.wait_for_exit(pids[1 - victim], timeout=120)
    output = ranks.output_path(run_dir, 1 - victim).read_text()
    os.kill(pids[victim], signal.SIGKILL)
    world.wait_for_exit(pids[victim])
    assert code == 4, output
    assert output.count("error: ") == 1, output
    assert f"process {victim} of this run has ended unexpectedly" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("victim", [0, 1])
def test_a_replica_that_runs_out_of_memory_is_reported_once(run_file, expected, tmp_path, victim):
    """The other rank waits in a collective, so the step is not repeated. The run can be resumed."""
    run_dir = tmp_path / "run"

    def before(number):
        if number != victim:
            return
        import torch

        from toolkit.train.trainer import GRPOTrainer

        losses = GRPOTrainer._compute_loss

        def narrow(trainer, model, inputs):
            if trainer.state.global_step == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return losses(trainer, model, inputs)

        GRPOTrainer._compute_loss = narrow

    pids = ranks.start_ranks(run_file, run_dir, HALF, before=before)
    codes = [world.wait_for_exit(pid) for pid in pids]
    output = ranks.printed_by_ranks(run_dir)
    assert codes == [1, 1], output
    assert sum(line.startswith("error: ") for line in output.splitlines()) == 1, output
    assert f"process {victim} ran out of memory. The process cannot repeat the step" in output
    assert "because 2 replicas train together" in output
    assert "Tried to allocate 2.00 GiB" in output
    assert "resumes from the last checkpoint" in output
    assert "Traceback" not in output
    assert resume_and_digest(run_file, run_dir) == expected


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_disk_is_full_is_reported_once(run_file, expected, tmp_path, victim):
    """A file size limit of 100 bytes prevents one rank from writing its files of checkpoint-4."""
    run_dir = tmp_path / "run"

    def before(number):
        if number != victim:
            return
        from toolkit.train.checkpointing import trainer_state

        save_rank = trainer_state._save_rank

        def full(snapshot, folder, rank):
            if snapshot.hf_state.global_step < 4:
                return save_rank(snapshot, folder, rank)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            try:
                return save_rank(snapshot, folder, rank)
            finally:
                unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

        trainer_state._save_rank = full

    pids = ranks.start_ranks(run_file, run_dir, HALF, before=before)
    codes = [world.wait_for_exit(pid) for pid in pids]
    output = ranks.printed_by_ranks(run_dir)
    assert codes == [codes[0]] * 2, output
    assert codes[0] == 1, output
    assert sum(line.startswith("error: ") for line in output.splitlines()) == 1, output
    assert "would be larger than the limit of this process" in output
    assert "(File too large)" in output
    assert "Traceback" not in output
    assert "checkpoint-2" in {path.name for path in run_dir.glob("checkpoint-*")}
    assert branch.valid_steps(run_dir) == [2]
    assert resume_and_digest(run_file, run_dir) == expected


def test_the_launcher_ends_a_stopped_rank(run_file, tmp_path):
    run_dir = tmp_path / "run"
    words = [world.BIN / "toolkit", "train", run_file, "--output-dir", run_dir]
    words += ["--set", HALF, "--set", "grpo.ddp_timeout=5", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        words,
        env=world.command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    world.wait_for(lambda: len(world.raw_rows(run_dir)) >= 2, timeout=300)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGSTOP)
    _, err = process.communicate(timeout=150)
    assert process.returncode == 4, err
    assert err.count("error: ") == 1, err
    assert not any(os.path.exists(f"/proc/{child}") for child in children)
    assert all(checkpoint.find_faults(one) == [] for one in run_dir.glob("checkpoint-*"))
    shutil.rmtree(run_dir)

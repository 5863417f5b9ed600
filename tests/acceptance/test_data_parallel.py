"""Runs with several ranks. They train the same adapter as one rank, and a resumed run writes the
same bytes. If a rank fails, one error is printed. A signal stops all ranks at the same step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import rank_world as ranks
import train_world as world

from toolkit.train.checkpointing import checkpoint
from toolkit.train.launch import free_port

pytestmark = pytest.mark.thorough

SLOW = ('reward.functions=[{name: "slow_rewards:ones"}]', "runtime.allow_code=[slow_rewards]")
HALF = ("grpo.per_device_train_batch_size=4",)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    import toolkit.train.run  # noqa: F401 - imported before the forks

    made = world.make_run_files(tmp_path_factory.mktemp("w"), steps=6)
    (made.parent / "slow_rewards.py").write_text(ranks.SLOW_REWARDS)
    (made.parent / "broken_rewards.py").write_text(ranks.FAILING_REWARDS)
    return made


def wait_for_success(pids, run_dir):
    codes = [world.wait_for_exit(pid) for pid in pids]
    assert codes == [0] * len(pids), ranks.printed_by_ranks(run_dir, len(pids))


def slow_case(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# overrides of (the run with one rank, the run with two ranks, both runs)
SPLITS = [
    pytest.param(
        (),
        (*HALF, "grpo.per_device_eval_batch_size=4"),
        ("grpo.beta=0.05", "grpo.eval_strategy=steps", "grpo.eval_steps=2"),
        id="batch",
    ),
    pytest.param(
        ("grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=4"),
        ("grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=2"),
        ("grpo.scale_rewards=batch",),
        id="accumulation",
    ),
    pytest.param(
        ("grpo.per_device_train_batch_size=12",),
        ("grpo.per_device_train_batch_size=6",),
        ("grpo.loss_type=grpo",),
        id="a group on two ranks",
    ),
    *(
        pytest.param((), HALF, (f"grpo.loss_type={loss}",), id=loss, marks=pytest.mark.slow)
        for loss in ("dr_grpo", "cispo", "sapo", "luspo", "vespo")
    ),
]


@pytest.mark.parametrize(("one_rank", "each_rank", "common"), SPLITS)
def test_two_ranks_train_as_one_rank_does(run_file, tmp_path, one_rank, each_rank, common):
    steps = "grpo.max_steps=4"
    one, two = tmp_path / "one", tmp_path / "two"
    pid = world.fork_run(
        run_file, tmp_path / "one.txt", f'runtime.output_dir="{one}"', steps, *one_rank, *common
    )
    wait_for_success(ranks.start_ranks(run_file, two, steps, *each_rank, *common), two)
    assert world.wait_for_exit(pid) == 0, (tmp_path / "one.txt").read_text()
    texts = [
        [(row["step"], row["prompt"], row["completion"]) for row in world.read_rows(d, COMPLETIONS)]
        for d in (one, two)
    ]
    assert texts[0] == texts[1]  # the same prompts and the same samples
    assert ranks.adapter_distance(one, two) < 1e-4 < 0.02 < ranks.largest_weight(one)
    for mine, theirs in zip(world.read_rows(one), world.read_rows(two), strict=True):
        evaluation = "eval/loss" in mine
        for name in EVALUATED if evaluation else TRAINED:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


COMPLETIONS = "completions.jsonl"
TRAINED = ("reward", "reward_std", "entropy", "completion_length", "grad_norm")
EVALUATED = ("eval/loss", "eval/reward", "eval/entropy", "eval/completion_length")


def test_two_killed_ranks_resume_to_the_same_bytes(run_file, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wait_for_success(ranks.start_ranks(run_file, whole, *HALF, *SLOW), whole)
    logs = [(tmp_path / f"whole-{n}.jsonl").read_text() for n in (0, 1)]
    assert logs[0] == logs[1]  # both ranks have the same metrics and adapter
    assert len(logs[0].splitlines()) >= 7
    pids = ranks.start_ranks(run_file, cut, *HALF, *SLOW)
    world.wait_for(lambda: len(world.raw_rows(cut)) >= 3)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [world.wait_for_exit(pid) for pid in pids] == [-signal.SIGKILL] * 2
    assert 0 < checkpoint.list_steps(cut)[0] < 6
    # A run with another number of processes than the checkpoint cannot resume.
    pid = world.fork_run(run_file, tmp_path / "alone.txt", f'runtime.output_dir="{cut}"', *SLOW)
    assert world.wait_for_exit(pid) == 1
    refused = (tmp_path / "alone.txt").read_text()
    assert "written by 2 processes, but this run has 1" in refused
    assert "--nproc-per-node 2" in refused
    wait_for_success(ranks.start_ranks(run_file, cut, *HALF, *SLOW), cut)
    assert world.result_digests(cut) == world.result_digests(whole)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_ranks_with_one_message(run_file, tmp_path, victim):
    run_dir = tmp_path / "run"
    pids = ranks.start_ranks(run_file, run_dir, *HALF, *SLOW)
    world.wait_for(lambda: len(world.raw_rows(run_dir)) >= 2)
    os.kill(pids[victim], signal.SIGKILL)
    sent = time.monotonic()
    assert world.wait_for_exit(pids[victim]) == -signal.SIGKILL
    assert world.wait_for_exit(pids[1 - victim]) == 4
    assert time.monotonic() - sent < 20
    output = ranks.printed_by_ranks(run_dir)
    assert output.count("\nerror:") == 1, output
    assert f"process {victim} of this run has ended unexpectedly" in output
    assert "to resume from the last checkpoint" in output
    assert "Traceback" not in output


def test_an_error_on_one_rank_is_reported_once_and_ends_all_with_its_code(run_file, tmp_path):
    run_dir = tmp_path / "run"
    broken = [line.replace("slow_", "broken_") for line in SLOW]
    pids = ranks.start_ranks(run_file, run_dir, *HALF, *broken)
    assert [world.wait_for_exit(pid) for pid in pids] == [1, 1]
    output = ranks.printed_by_ranks(run_dir)
    assert output.count("\nerror:") == 1, output
    assert "ValueError: the reward of process 1" in output
    assert (run_dir / "bad_rewards.jsonl").exists()
    assert checkpoint.list_steps(run_dir) == [2]


@pytest.mark.parametrize("victim", [slow_case(0), 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(run_file, tmp_path, victim):
    run_dir = tmp_path / "run"
    pids = ranks.start_ranks(run_file, run_dir, *HALF, *SLOW)
    world.wait_for(lambda: len(world.raw_rows(run_dir)) >= 2)
    os.kill(pids[victim], signal.SIGUSR1)
    assert [world.wait_for_exit(pid) for pid in pids] == [75, 75], ranks.printed_by_ranks(run_dir)
    output = ranks.printed_by_ranks(run_dir)
    latest = checkpoint.list_steps(run_dir)[0]
    assert output.count("\nerror:") == 1, output
    assert f"stopped by SIGUSR1; checkpoint-{latest} was saved" in output
    assert checkpoint.find_faults(run_dir / f"checkpoint-{latest}") == []
    assert len(world.read_rows(run_dir)) == latest


def command(*words, **more):
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=world.command_environment(**more),
    )


def two_ranks(run_file, run_dir):
    """Start the command with two ranks and wait for two rows of metrics."""
    sets = [word for text in (*HALF, *SLOW) for word in ("--set", text)]
    words = ["toolkit", "train", run_file, "--nproc-per-node", "2", "--output-dir", run_dir]
    process = command(*map(str, words), *sets)
    world.wait_for(lambda: len(world.raw_rows(run_dir)) >= 2)
    return process


def test_the_command_starts_its_ranks_and_passes_on_signals_and_the_exit_code(run_file, tmp_path):
    process = two_ranks(run_file, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "2 processes" in out
    assert err.count("error: ") == 1
    assert "stopped by SIGTERM" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_a_checkpoint_and_no_rank(run_file, tmp_path):
    run_dir = tmp_path / "run"
    process = two_ranks(run_file, run_dir)
    process.kill()
    _, err = process.communicate(timeout=60)  # returns when the ranks have closed stderr too
    assert process.returncode == -signal.SIGKILL
    assert "stopped by SIGTERM; checkpoint-" in err
    assert checkpoint.find_faults(run_dir / f"checkpoint-{checkpoint.list_steps(run_dir)[0]}") == []


@pytest.mark.slow
def test_torchrun_can_start_the_command(run_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    wait_for_success(ranks.start_ranks(run_file, one, *HALF, *SLOW), one)
    sets = [word for text in (*HALF, *SLOW) for word in ("--set", text)]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "toolkit", "train"]
    process = command(*launcher, str(run_file), "--output-dir", str(two), *sets)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "2 processes" in out
    assert world.result_digests(one) == world.result_digests(two)


@pytest.mark.slow
def test_a_launcher_on_each_of_two_nodes_starts_one_run(run_file, tmp_path):
    """The pods of containers/kubernetes/train-groups.yaml start one command per node like this."""
    one, two = tmp_path / "one", tmp_path / "two"
    wait_for_success(ranks.start_ranks(run_file, one, *HALF, *SLOW), one)
    sets = [word for text in (*HALF, *SLOW) for word in ("--set", text)]
    words = ["toolkit", "train", str(run_file), "--output-dir", str(two), *sets]
    node_environment = {
        "PET_NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    nodes = [
        command(*words, "--nproc-per-node", "1", **node_environment, PET_NODE_RANK=str(n))
        for n in (0, 1)
    ]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 processes" in outputs[0][0]
    assert outputs[1][0] == ""
    assert world.result_digests(one) == world.result_digests(two)


@pytest.mark.engine
@pytest.mark.parametrize("steps", [slow_case(1), slow_case(6)])
def test_two_vllm_engines_train_as_one_engine_does(run_file, tmp_path, steps):
    pytest.importorskip("vllm")
    one, two = tmp_path / "one", tmp_path / "two"
    common = ("runtime.engine=vllm", f"grpo.max_steps={steps}", "grpo.num_generations=4")
    wait_for_success(
        ranks.start_ranks(run_file, two, "grpo.per_device_train_batch_size=6", *common), two
    )
    logs = [(tmp_path / f"two-{n}.jsonl").read_text() for n in (0, 1)]
    assert logs[0] == logs[1]
    texts = {row["completion"] for row in world.read_rows(two, COMPLETIONS)}
    assert len(texts) > 6  # the two ranks sample different completions
    if steps == 1:
        return
    output_override = f'runtime.output_dir="{one}"'
    whole = "grpo.per_device_train_batch_size=12"
    pid = world.fork_run(run_file, tmp_path / "one.txt", output_override, whole, *common)
    assert world.wait_for_exit(pid) == 0, (tmp_path / "one.txt").read_text()
    rows = [[row["completion"] for row in world.read_rows(d, COMPLETIONS)] for d in (one, two)]
    assert rows[0] == rows[1]
    assert ranks.adapter_distance(one, two) < 1e-4 < 0.02 < ranks.largest_weight(one)

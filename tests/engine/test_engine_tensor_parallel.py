"""One model split over several processes: the engines sample and the trainer learns the same as in
one process. tests/unit/policy tests the arithmetic without an engine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import split_world as world

from toolkit.config.parallel import SPLIT_MODELS
from toolkit.train.checkpointing import checkpoint
from toolkit.train.launch import child_environment, free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.engine
pytest.importorskip("vllm")

WORKER = Path(__file__).with_name("split_engine.py")
SPLIT = "model.tensor_parallel_size=2"
FAMILIES = (
    "llama", "smollm", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite",
)  # fmt: skip


def run_workers(
    size: int, families: Sequence[str], folder: Path, worker: Path = WORKER
) -> list[dict[str, Any]]:
    """Run ``size`` processes whose engines share a model; return all their results."""
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder), *families],
            env=child_environment(number, size, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(size)
    ]
    outputs = [worker.communicate(timeout=900)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size, outputs
    return [json.loads(line) for text in outputs for line in text.splitlines() if line[:1] == "{"]


def check_results(results: list[dict[str, Any]], count: int) -> None:
    assert len(results) == count
    for result in results:
        assert result["logits"] < 1e-5, result
        assert max(result["gaps"]) < 1e-5, "the sampled policy is the trained policy"
        assert result["moved"] > 1e-3, "the second adapter must change the policy"
        assert result["shared"], "every parameter lies in the engine's storage"
    for family in {result["family"] for result in results}:
        assert len({str(result["ids"]) for result in results if result["family"] == family}) == 1


def test_two_engines_share_a_model(tmp_path: Path) -> None:
    check_results(run_workers(2, ["llama"], tmp_path), 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_families_are_split(tmp_path: Path, size: int) -> None:
    """With four processes and two KV heads, each head is in two processes."""
    check_results(run_workers(size, FAMILIES, tmp_path), size * len(FAMILIES))


@pytest.mark.slow
def test_engines_that_run_out_of_memory_repeat_the_rollout(tmp_path: Path) -> None:
    """If only one engine runs out of memory, the other waits in an all-reduce, and the run ends
    with an error that gives the reason.
    """
    results = run_workers(2, [], tmp_path / "model", WORKER.with_name("split_memory.py"))
    for result in results:
        assert result["same"]
        assert result["most"] == 6, "of twelve sequences"
        assert result["as before"]
    error_name, message, fix = results[1]["alone"]
    assert error_name == "ConfigError"
    assert "process 1 ran out of memory during a rollout" in message
    assert "resumes from the last checkpoint" in fix
    assert results[0]["alone"][0] == "NodeError", (
        "the error for process_control: the other process has ended"
    )


def test_every_supported_model_type_is_tested() -> None:
    model_types = {"smollm": "llama", "gemma3": "gemma3_text"}
    assert {model_types.get(family, family) for family in FAMILIES} == SPLIT_MODELS


@pytest.mark.slow
def test_two_processes_learn_like_one(tmp_path: Path) -> None:
    run_file = world.make_run_files(tmp_path / "w", steps=10)
    one, two, repeated = (tmp_path / name for name in ("one", "two", "again"))
    world.run_training(run_file, one, 1)
    output = world.run_training(run_file, two, 2, SPLIT)
    assert "2 processes that share a model" in output
    assert world.read_completions(one) == world.read_completions(two)
    assert world.largest_adapter_difference(one, two) < 1e-4
    for one_row, two_row in zip(world.read_metrics(one), world.read_metrics(two), strict=True):
        assert two_row["sampling/logp_gap_mean"] < 1e-5
        for name in ("reward", "entropy", "grad_norm"):
            assert one_row[name] == pytest.approx(two_row[name], rel=1e-3, abs=1e-5), name
    world.run_training(run_file, repeated, 2, SPLIT)
    assert world.output_digests(repeated) == world.output_digests(two)


@pytest.mark.slow
def test_two_replicas_of_two_learn_like_one_process(tmp_path: Path) -> None:
    run_file = world.make_run_files(tmp_path / "w", steps=4)
    one, four = tmp_path / "one", tmp_path / "four"
    world.run_training(run_file, one, 1)
    output = world.run_training(run_file, four, 4, SPLIT, "grpo.per_device_train_batch_size=4")
    assert "4 processes: 2 groups of 2 that share a model" in output
    assert world.read_completions(one) == world.read_completions(four)
    assert world.largest_adapter_difference(one, four) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_one_error(tmp_path: Path, victim: int) -> None:
    run_file = world.make_run_files(tmp_path / "w", steps=6, delay=0.3)
    full_run, killed_run = tmp_path / "whole", tmp_path / "cut"
    world.run_training(run_file, full_run, 2, SPLIT)
    running = world.start_training(run_file, killed_run, 2, SPLIT)
    deadline = time.monotonic() + 300
    while len(world.read_metrics(killed_run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(running.pid).children()}
    os.kill(ranks[str(victim)].pid, signal.SIGKILL)
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 4, output
    assert output.count("error:") == 1, output
    assert f"process {victim}" in output
    assert 0 < checkpoint.list_steps(killed_run)[0] < 6
    # The checkpoint is complete: one process resumes from it, with results equal up to rounding.
    resumed = tmp_path / "w" / "copy"
    subprocess.run(["cp", "-r", str(killed_run), str(resumed)], check=True)
    resumed_output = world.run_training(run_file, resumed, 1)
    assert "written with tensor_parallel_size 2, now 1: results are equal up to" in resumed_output
    world.run_training(run_file, killed_run, 2, SPLIT)
    assert world.output_digests(killed_run) == world.output_digests(full_run)
    assert world.largest_adapter_difference(resumed, full_run) < 1e-4


@pytest.mark.slow
def test_a_model_that_cannot_be_split_is_refused_before_the_start(tmp_path: Path) -> None:
    run_file = world.make_run_files(tmp_path / "w", "phi3")
    process = world.start_training(run_file, tmp_path / "run", 2, SPLIT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "TP003" in output
    assert "phi3" in output

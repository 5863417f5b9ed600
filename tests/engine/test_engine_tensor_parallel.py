"""One model over several processes: what the engines sample and the trainer learns is what one
process samples and learns. tests/unit/policy has the arithmetic without an engine.
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


def sampled(
    size: int, families: Sequence[str], folder: Path, worker: Path = WORKER
) -> list[dict[str, Any]]:
    """What each of ``size`` engines that share a model found, a family after the other."""
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
    told = [worker.communicate(timeout=900)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size, told
    return [json.loads(line) for text in told for line in text.splitlines() if line[:1] == "{"]


def judge(found: list[dict[str, Any]], count: int) -> None:
    assert len(found) == count
    for one in found:
        assert one["logits"] < 1e-5, one
        assert max(one["gaps"]) < 1e-5, "the sampled policy is the trained policy"
        assert one["moved"] > 1e-3, "the second adapter is another policy"
        assert one["shared"], "every parameter lies in the engine's storage"
    for family in {one["family"] for one in found}:
        assert len({str(one["ids"]) for one in found if one["family"] == family}) == 1


def test_two_engines_share_a_model(tmp_path: Path) -> None:
    judge(sampled(2, ["llama"], tmp_path), 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_families_are_split(tmp_path: Path, size: int) -> None:
    """With four processes and two KV heads, each head is in two of them."""
    judge(sampled(size, FAMILIES, tmp_path), size * len(FAMILIES))


@pytest.mark.slow
def test_engines_that_run_out_of_memory_together_repeat_the_rollout(tmp_path: Path) -> None:
    """If one of them does alone, the other waits in a sum, and the run ends with the reason."""
    found = sampled(2, [], tmp_path / "model", WORKER.with_name("split_memory.py"))
    for one in found:
        assert one["same"]
        assert one["most"] == 6, "of twelve sequences"
        assert one["as before"]
    kind, message, fix = found[1]["alone"]
    assert kind == "ConfigError"
    assert "process 1 ran out of memory during a rollout" in message
    assert "resumes from the last checkpoint" in fix
    assert found[0]["alone"][0] == "NodeError", "for process_control: its partner is gone"


def test_every_kind_that_is_let_through_is_tried() -> None:
    kinds = {"smollm": "llama", "gemma3": "gemma3_text"}
    assert {kinds.get(one, one) for one in FAMILIES} == SPLIT_MODELS


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    run_file = world.make(tmp_path / "w", steps=10)
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    world.train(run_file, one, 1)
    told = world.train(run_file, two, 2, SPLIT)
    assert "2 processes that share a model" in told
    assert world.completions(one) == world.completions(two)
    assert world.distance(one, two) < 1e-4
    for mine, theirs in zip(world.rows(one), world.rows(two), strict=True):
        assert theirs["sampling/logp_gap_mean"] < 1e-5
        for name in ("reward", "entropy", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    world.train(run_file, again, 2, SPLIT)
    assert world.digests(again) == world.digests(two)


@pytest.mark.slow
def test_two_replicas_of_two_learn_what_one_process_learns(tmp_path: Path) -> None:
    run_file = world.make(tmp_path / "w", steps=4)
    one, four = tmp_path / "one", tmp_path / "four"
    world.train(run_file, one, 1)
    told = world.train(run_file, four, 4, SPLIT, "grpo.per_device_train_batch_size=4")
    assert "4 processes: 2 of 2 that share a model" in told
    assert world.completions(one) == world.completions(four)
    assert world.distance(one, four) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_all_with_one_message(tmp_path: Path, victim: int) -> None:
    run_file = world.make(tmp_path / "w", steps=6, delay=0.3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    world.train(run_file, whole, 2, SPLIT)
    running = world.start(run_file, cut, 2, SPLIT)
    end = time.monotonic() + 300
    while len(world.rows(cut)) < 3 and time.monotonic() < end:
        time.sleep(0.1)
    ranks = {one.environ().get("RANK"): one for one in psutil.Process(running.pid).children()}
    os.kill(ranks[str(victim)].pid, signal.SIGKILL)
    told, _ = running.communicate(timeout=300)
    assert running.returncode == 4, told
    assert told.count("error:") == 1, told
    assert f"process {victim}" in told
    assert 0 < checkpoint.list_steps(cut)[0] < 6
    # The checkpoint is whole: one process goes on from it, to rounding.
    resumed = tmp_path / "w" / "copy"
    subprocess.run(["cp", "-r", str(cut), str(resumed)], check=True)
    said = world.train(run_file, resumed, 1)
    assert "written with tensor_parallel_size 2, now 1: results are equal up to" in said
    world.train(run_file, cut, 2, SPLIT)
    assert world.digests(cut) == world.digests(whole)
    assert world.distance(resumed, whole) < 1e-4


@pytest.mark.slow
def test_what_cannot_be_split_is_refused_before_the_start(tmp_path: Path) -> None:
    run_file = world.make(tmp_path / "w", "phi3")
    process = world.start(run_file, tmp_path / "run", 2, SPLIT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "TP003" in told
    assert "phi3" in told

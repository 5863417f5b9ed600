"""A run of processes that share a model learns what one process learns, stores what one stores, and
goes on with another number of processes. Without an engine: Hugging Face generation on the split
model, over gloo.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.train.checkpointing import checkpoint
from toolkit.train.launch import child_environment, free_port

WORKER = Path(__file__).with_name("split_trainer.py")
pytestmark = pytest.mark.slow


def train(folder: Path, world: int, size: int, steps: int, how: str = "fresh") -> list[Any]:
    """What each of ``world`` processes found, ``size`` of which share a model."""
    port = free_port()
    words = [sys.executable, str(WORKER), str(size), str(folder), str(steps), how]
    workers = [
        subprocess.Popen(
            words, env=child_environment(number, world, port), stdout=subprocess.PIPE, text=True
        )
        for number in range(world)
    ]
    told = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, told
    return [json.loads(text.strip().splitlines()[-1]) for text in told]


def adapter(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder.with_name(f"{folder.name}-{rank}.pt"))
    return found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Four steps of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, train(folder, 1, 1, 4)


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 2)])
def test_processes_that_share_a_model_learn_what_one_learns(
    alone: tuple[Path, list[Any]], tmp_path: Path, world: int, size: int
) -> None:
    folder = tmp_path / "run"
    found = train(folder, world, size, 4)
    for number, one in enumerate(found):
        assert one["seen"] == [world // size, number // size], "what TRL takes for the run"
        assert one["called"] == (number % size == 0), "rewards are called once a group"
        assert one["cut"] > 0
        assert one["check"]["unchanged"]
        assert distance(adapter(folder, number), adapter(alone[0])) < 1e-4
        assert distance(adapter(folder, number), adapter(folder, 0)) == 0
    if world == size:  # with replicas the planted part of the reward is another row's
        for mine, theirs in zip(found[0]["rows"], alone[1][0]["rows"], strict=True):
            for name, value in theirs.items():
                if value is None:  # nothing was measured
                    assert mine[name] is None, name
                else:
                    assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_they_draw_the_same_groups_again(tmp_path: Path) -> None:
    """Dynamic sampling and the curriculum: two groups of two processes, and one process."""
    alone = train(tmp_path / "alone", 1, 1, 3, "choose")
    found = train(tmp_path / "four", 4, 2, 3, "choose")
    rows = alone[0]["rows"]
    assert sum(row["dynamic_sampling/rounds"] for row in rows) > 0
    assert rows[-1]["curriculum/mean_spread"] > 0
    for number, one in enumerate(found):
        assert one["called"] == (number % 2 == 0)
        assert distance(adapter(tmp_path / "four", number), adapter(tmp_path / "alone")) < 1e-4
        for mine, theirs in zip(one["rows"], rows, strict=True):
            for name, value in theirs.items():  # None: nothing was measured before the first step
                wanted = value and pytest.approx(value, rel=1e-3, abs=1e-5)
                assert mine[name] == wanted, (number, name)


@pytest.mark.parametrize("victim", [0, 1])
def test_out_of_memory_in_one_process_repeats_the_step_in_all(
    alone: tuple[Path, list[Any]], tmp_path: Path, victim: int
) -> None:
    folder = tmp_path / "run"
    found = train(folder, 2, 2, 4, f"narrow {victim}")
    for number, one in enumerate(found):
        failures = ["forward", "backward", "end"] if number == victim else []
        assert one["failures"] == failures
        assert one["parts"] == 8, "cut in two three times, in both processes"
        assert one["micro steps"] == 4
        assert distance(adapter(folder, number), adapter(alone[0])) < 1e-4
        assert distance(adapter(folder, number), adapter(folder, 0)) == 0
    for mine, theirs in zip(found[0]["rows"], alone[1][0]["rows"], strict=True):
        for name, value in theirs.items():
            if value is None:  # nothing was measured
                assert mine[name] is None, name
            else:
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_checkpoint_is_whole_and_goes_on_with_any_number(
    alone: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    train(two, 2, 2, 2)
    assert checkpoint.list_steps(two) == [2]
    assert not checkpoint.find_faults(checkpoint.path_of(two, 2))
    assert checkpoint.tensor_parallel_size_of(checkpoint.path_of(two, 2)) == 2
    names = sorted(path.name for path in checkpoint.path_of(two, 2).glob("rank-*"))
    assert names == ["rank-0.json", "rank-0.safetensors"]
    shutil.copytree(two, one)
    train(two, 2, 2, 4, "resume")
    train(one, 1, 1, 4, "resume")
    assert distance(adapter(two), adapter(alone[0])) < 1e-4
    assert distance(adapter(one), adapter(alone[0])) < 1e-4
    straight = tmp_path / "straight"
    train(straight, 2, 2, 4)
    assert distance(adapter(two), adapter(straight)) == 0, "a resumed run has the same bytes"

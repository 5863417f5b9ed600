"""Processes that share a model train the same adapter and write the same checkpoint as one process,
and the run resumes with another number of processes. The tests use no engine, but Hugging Face
generation on the split model, with the backend gloo.
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


def train_in_processes(
    folder: Path, world: int, size: int, steps: int, mode: str = "fresh"
) -> list[Any]:
    """The report of each of ``world`` processes. Groups of ``size`` processes share a model."""
    port = free_port()
    command = [sys.executable, str(WORKER), str(size), str(folder), str(steps), mode]
    workers = [
        subprocess.Popen(
            command, env=child_environment(rank, world, port), stdout=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, outputs
    return [json.loads(text.strip().splitlines()[-1]) for text in outputs]


def saved_adapter(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder.with_name(f"{folder.name}-{rank}.pt"))
    return found


def max_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A run of four steps in one process: (folder, reports)."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, train_in_processes(folder, 1, 1, 4)


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 2)])
def test_processes_that_share_a_model_train_as_one_process_does(
    one_process: tuple[Path, list[Any]], tmp_path: Path, world: int, size: int
) -> None:
    folder = tmp_path / "run"
    reports = train_in_processes(folder, world, size, 4)
    for rank, report in enumerate(reports):
        assert report["seen"] == [world // size, rank // size], (
            "TRL must count each group as one process"
        )
        assert report["called"] == (rank % size == 0), (
            "only the first process of a group calls the rewards"
        )
        assert report["cut"] > 0
        assert report["check"]["unchanged"]
        assert max_difference(saved_adapter(folder, rank), saved_adapter(one_process[0])) < 1e-4
        assert max_difference(saved_adapter(folder, rank), saved_adapter(folder, 0)) == 0
    if world == size:  # the rows of a run with replicas are not compared
        for row, expected_row in zip(reports[0]["rows"], one_process[1][0]["rows"], strict=True):
            for name, value in expected_row.items():
                if value is None:  # nothing was measured
                    assert row[name] is None, name
                else:
                    assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_processes_that_share_a_model_resample_the_same_groups(tmp_path: Path) -> None:
    """With dynamic sampling and the curriculum, two groups of two processes match one process."""
    one_process = train_in_processes(tmp_path / "alone", 1, 1, 3, "choose")
    reports = train_in_processes(tmp_path / "four", 4, 2, 3, "choose")
    rows = one_process[0]["rows"]
    assert sum(row["dynamic_sampling/rounds"] for row in rows) > 0
    assert rows[-1]["curriculum/mean_spread"] > 0
    for rank, report in enumerate(reports):
        assert report["called"] == (rank % 2 == 0)
        assert (
            max_difference(
                saved_adapter(tmp_path / "four", rank), saved_adapter(tmp_path / "alone")
            )
            < 1e-4
        )
        for own_row, expected_row in zip(report["rows"], rows, strict=True):
            # None: the value was not measured before the first step.
            for name, value in expected_row.items():
                expected = value and pytest.approx(value, rel=1e-3, abs=1e-5)
                assert own_row[name] == expected, (rank, name)


@pytest.mark.parametrize("victim", [0, 1])
def test_out_of_memory_in_one_process_repeats_the_step_in_all(
    one_process: tuple[Path, list[Any]], tmp_path: Path, victim: int
) -> None:
    folder = tmp_path / "run"
    reports = train_in_processes(folder, 2, 2, 4, f"narrow {victim}")
    for rank, report in enumerate(reports):
        failures = ["forward", "backward", "end"] if rank == victim else []
        assert report["failures"] == failures
        assert report["parts"] == 8, "both processes must halve the micro-batch three times"
        assert report["micro steps"] == 4
        assert max_difference(saved_adapter(folder, rank), saved_adapter(one_process[0])) < 1e-4
        assert max_difference(saved_adapter(folder, rank), saved_adapter(folder, 0)) == 0
    for row, expected_row in zip(reports[0]["rows"], one_process[1][0]["rows"], strict=True):
        for name, value in expected_row.items():
            if value is None:  # nothing was measured
                assert row[name] is None, name
            else:
                assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_checkpoint_is_complete_and_resumes_with_any_number_of_processes(
    one_process: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    train_in_processes(two, 2, 2, 2)
    assert checkpoint.list_steps(two) == [2]
    assert not checkpoint.find_faults(checkpoint.path_of(two, 2))
    assert checkpoint.tensor_parallel_size_of(checkpoint.path_of(two, 2)) == 2
    names = sorted(path.name for path in checkpoint.path_of(two, 2).glob("rank-*"))
    assert names == ["rank-0.json", "rank-0.safetensors"]
    shutil.copytree(two, one)
    train_in_processes(two, 2, 2, 4, "resume")
    train_in_processes(one, 1, 1, 4, "resume")
    assert max_difference(saved_adapter(two), saved_adapter(one_process[0])) < 1e-4
    assert max_difference(saved_adapter(one), saved_adapter(one_process[0])) < 1e-4
    straight = tmp_path / "straight"
    train_in_processes(straight, 2, 2, 4)
    assert max_difference(saved_adapter(two), saved_adapter(straight)) == 0, (
        "a resumed run must have the same bytes"
    )
